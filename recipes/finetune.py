"""Fine-tune Gemma: `accelerate launch recipes/finetune.py --config recipes/configs/gemma-tiny-lora-cpu.yaml`.

The whole run at a glance; each line is a call into the library. With the config's section `lora` adapters are trained,
without it all weights.
"""

from gemma_xla.cli import recipe
from gemma_xla.config import RunConfig


def main(config: RunConfig) -> None:
    from gemma_xla.train import Run, Trainer, finish

    with Run(config) as run:  # base model, devices, examples and the run's folder; mistakes end here
        trainer = Trainer(run)  # model, optimizer and loaders, new or from the newest checkpoint
        trainer.fit()  # the steps, with evaluation, samples and checkpoints in between
        if run.is_main:
            finish(run)  # curves, adapter or model as a Hugging Face folder, and where they are


if __name__ == "__main__":
    recipe("Fine-tune Gemma: adapters (LoRA) or all weights.", main, finetunes=True)
