"""Encoders and decoders of tokenizers: signals as arrays -> latents, and codes -> signals.

    vit.py             ViTEncoder, ViTDecoder: patches -> transformer -> latents, and back    images, maps
    vectors.py         VectorEncoder, VectorDecoder: one vector -> bottleneck MLP -> latent    global features, poses
    patch_mixing.py    PatchEncoder, PatchDecoder: principal components + residual             small images
    diffusion.py       DiffusionDecoder over a UNet or a UViT (unet.py): denoises the signal   any of these

Each is a frozen dataclass; `make` builds its module, which maps [B H W C] to [B h w D] or back. `patch_size` pixels of
a side make one token.
"""
