"""Settings of the TPU compiler that differ from its own: the same for a run and for its plan.

What each is worth is the estimate of Gemma 2B's step on v5e-256 without and with it (docs/LOG.md, 2026-11-23).
"""

from __future__ import annotations

FLAGS = {
    # PyTorch/XLA sets these by itself where it finds a TPU (`torch_xla/__init__.py`). They stand here so that a plan
    # has them too. 0.016 s less.
    "xla_tpu_use_enhanced_launch_barrier": "false",
    "xla_latency_hiding_scheduler_rerun": "1",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_flash_attention": "false",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_collective_permute": "true",
    # Memory on the chip that one operation may have; more lets matrix products use larger tiles. 0.046 s less. Yet more
    # takes the compiler longer: 32768 gains 0.4% of 2B's step and 3% of 7B's, in one and a half times the time;
    # 98304 no more than that, in six times the time.
    "xla_tpu_scoped_vmem_limit_kib": "24576",
    # Gradients are reduced while matrix products run. All of these together: 0.031 s less; the first and the second
    # without the others: nothing.
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Reductions of large matrices are not joined with others at the end of a layer, but hide one by one: 0.013 s less.
    "xla_jf_crs_combiner_threshold_in_bytes": str(32 * 2**20),
}


def libtpu_arguments(given: str = "") -> str:
    """The value of ``LIBTPU_INIT_ARGS``: `FLAGS`, but for those that ``given``, the user's own value, sets itself."""
    named = {argument.lstrip("-").partition("=")[0] for argument in given.split()}
    ours = (f"--{name}={value}" for name, value in FLAGS.items() if name not in named)
    return " ".join([*ours, *given.split()])
