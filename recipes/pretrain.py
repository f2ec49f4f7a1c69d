"""Pretrain Gemma: `accelerate launch recipes/pretrain.py --config recipes/configs/quickstart.yaml`.

The whole run at a glance; each line is a call into the library.
"""

from gemma_xla.cli import recipe
from gemma_xla.config import RunConfig


def main(config: RunConfig) -> None:
    from gemma_xla.train import Run, Trainer, finish

    with Run(config) as run:  # devices, data, tokenizer and the run's folder; mistakes end here
        trainer = Trainer(run)  # model, optimizer and loaders, new or from the newest checkpoint
        trainer.fit()  # the steps, with evaluation and checkpoints in between
        if run.is_main:
            finish(run)  # curves, Hugging Face folder, sample, and where they are


if __name__ == "__main__":
    recipe("Pretrain Gemma.", main)
