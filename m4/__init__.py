"""m4: one any-to-any multimodal model in JAX. `from m4 import Sampler` uses a trained one."""

__all__ = ["Sampler"]


def __getattr__(name: str):
    # On first use: workers that only read data must not load JAX.
    if name == "Sampler":
        from m4.sampler import Sampler

        return Sampler
    raise AttributeError(f"module 'm4' has no attribute {name!r}")
