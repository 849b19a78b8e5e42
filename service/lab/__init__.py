"""Offline tools: what is done to data and logs beside the gateway, which never imports it."""
