"""Quantizers: latent vectors -> token ids -> codes, and how much of a codebook is used.

    VectorQuantizer           nearest code; codebooks are moving averages      van den Oord et al. 2017, appendix A.1
    LearnedVectorQuantizer    nearest code; codebooks learn from the loss      the same, section 3.2, without its stops
    Memcodes                  best key of each codebook, its value             4M-21's vectors (lucidrains' NWT)
    FiniteScalarQuantizer     each value rounded to a few levels              Mentzer et al. 2023
    LookupFreeQuantizer       each value's sign                                Yu et al. 2023 (MAGVIT-v2), section 3.1

Each is a frozen dataclass that says `num_codes`, `num_codebooks` and `latent_size`, and `make` builds its module:

    module(latents [... D], key) -> Quantized(codes [... D], ids [...], loss)     straight-through gradients
    module.look_up(ids [...]) -> codes [... D]
    module.update(latents, ids, key)       updates without gradients (moving averages, dead codes)
    module.start_from(latents, seed)       a first fit, before any training

With more than one codebook ids have a last axis C. A new quantizer is one more such pair, in a file of its own.

N vectors, C codebooks, K codes, D dimensions, d = D / C; `...` any leading axes
"""
