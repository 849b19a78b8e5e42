"""The offline stage: from labelled pairs to a checkpoint. Needs torch; the running service never imports it."""
