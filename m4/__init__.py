"""m4: one any-to-any multimodal model in JAX. `from m4 import Sampler, features` uses a trained one."""

__all__ = ["Sampler", "features"]


def __getattr__(name: str):
    # On first use: workers that only read data must not load JAX.
    if name == "Sampler":
        from m4.inference.sampler import Sampler

        return Sampler
    if name == "features":
        from m4.representations.embed import features

        return features
    raise AttributeError(f"module 'm4' has no attribute {name!r}")
