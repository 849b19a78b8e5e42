"""A few steps of one of TRL's trainers on a tiny random Llama against a running gateway, in a process of its own.

`python -m tests.support.trl_training KIND --url URL --run RUN --model DIR` prints one JSON line. Warnings are TRL's and
transformers' own affair, hence not in pytest's process. KIND: grpo, grpo-async, grpo-chat, grpo-quiet (no judge), rloo,
online-dpo, online-dpo-ipo, online-dpo-penalty, online-dpo-plain (no mixin).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

from service.trainers.online_dpo import LossFeedbackMixin
from service.trainers.rowwise import Judged
from service.trainers.trl import AsyncRouterReward, RouterReward
from service.trainers.values import Feedback

PROMPTS = ["a b c", "d e f", "g h i", "j k l"]


def prefer_the_longer(judged: Judged) -> Feedback | None:
    """A truth that the scripted RMs can be right or wrong about."""
    assert judged.columns["answer"][0] == f"answer to {judged.prompt}"
    lengths = [len(response) for response in judged.responses]
    return Feedback(preferred=lengths.index(max(lengths)))


def prefer_the_first(judged: Judged) -> Feedback | None:
    """For conversations, whose prompt is rendered."""
    assert judged.prompt.startswith("System: s\n\nUser: ")
    return Feedback(preferred=0)


def rows(chat: bool) -> list[dict[str, Any]]:
    """The data set: prompts, and a column that the judge sees."""
    texts = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}] if chat else prompt
        for prompt in PROMPTS
    ]
    return [{"prompt": text, "answer": f"answer to {prompt}"} for text, prompt in zip(texts, PROMPTS, strict=True)]


def arguments_for(config: Any, folder: str, steps: int, **more: Any) -> Any:
    """The trainer's configuration."""
    return config(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        **more,
    )


def group_trainer(kind: str, options: dict[str, Any], model: str, folder: str, steps: int) -> tuple[Any, Any]:
    """GRPO or RLOO."""
    import datasets
    import trl

    chat = kind.endswith("chat")
    judge = None if kind.endswith("quiet") else prefer_the_first if chat else prefer_the_longer
    reward: Any = (AsyncRouterReward if kind.endswith("async") else RouterReward)(judge=judge, **options)
    trainer_class, config = (
        (trl.RLOOTrainer, trl.RLOOConfig) if kind.startswith("rloo") else (trl.GRPOTrainer, trl.GRPOConfig)
    )
    training = arguments_for(config, folder, steps, num_generations=2, max_completion_length=8, beta=0.04)
    data = datasets.Dataset.from_list(rows(chat))
    return trainer_class(model=model, reward_funcs=reward, args=training, train_dataset=data), reward


def pair_trainer(kind: str, options: dict[str, Any], model: str, folder: str, steps: int) -> tuple[Any, Any]:
    """Online DPO, with the mixin or without."""
    import datasets
    import transformers
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    class Trainer(LossFeedbackMixin, OnlineDPOTrainer):  # type: ignore[misc]
        """TRL's, with losses sent back."""

    reward = RouterReward(**options)
    training = arguments_for(
        OnlineDPOConfig,
        folder,
        steps,
        max_new_tokens=8,
        max_length=32,
        loss_type="ipo" if kind.endswith("ipo") else "sigmoid",
        missing_eos_penalty=1.0 if kind.endswith("penalty") else None,
    )
    plain = kind.endswith("plain")
    trainer = (OnlineDPOTrainer if plain else Trainer)(
        model=transformers.AutoModelForCausalLM.from_pretrained(model),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=training,
        train_dataset=datasets.Dataset.from_list(rows(False)),
    )
    return trainer, reward


def warm() -> None:
    """Import what every kind needs."""
    import datasets  # noqa: F401
    import trl.experimental.online_dpo

    # These load their trainers when they are asked for.
    _ = trl.GRPOTrainer, trl.RLOOTrainer, trl.experimental.online_dpo.OnlineDPOTrainer


def main() -> None:
    """Train, and print what is worth a check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--url", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=20.0)
    given = parser.parse_args()
    options = {"url": given.url, "run": given.run, "deadline_seconds": given.deadline}
    with tempfile.TemporaryDirectory() as folder:
        make = pair_trainer if given.kind.startswith("online-dpo") else group_trainer
        trainer, _ = make(given.kind, options, given.model, folder, given.steps)
        steps: list[dict[str, Any]] = []
        own_step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = own_step(*args, **kwargs)
            steps.append({"loss": float(loss), "pairs": list(getattr(trainer, "last_pair_losses", []))})
            return loss

        trainer.training_step = watched
        trainer.train()
        counts = getattr(trainer, "loss_counts", None)
        found = {
            "steps": steps,
            "log": trainer.state.log_history,
            "counts": None
            if counts is None
            else {name: getattr(counts, name) for name in ("posted", "declined", "dropped", "overruled")},
        }
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
