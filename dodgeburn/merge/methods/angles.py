"""Merging along angles: spherical interpolation, rotation, cosine similarity. All work on whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TINY = 1e-12  # norms below are zero
_FLAT = 1e-4  # sines below are a straight line


def slerp(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """Spherical interpolation of the flattened tensors (Shoemake 1985), magnitudes interpolated linearly:

    ((1 - alpha)|A| + alpha |B|) (sin((1 - alpha) w) A/|A| + sin(alpha w) B/|B|) / sin w, w the angle between.

    Degenerate cases are plain weighted sums: fewer than two values, a norm of zero, parallel or opposite
    tensors (sin w < 1e-4: nothing to turn through, or no plane to turn in).
    """
    import torch

    a, b = models
    if alpha in (0.0, 1.0):
        out.copy_(b if alpha else a)
        return
    norm_a, norm_b = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    if a.numel() < 2 or norm_a < _TINY or norm_b < _TINY:
        torch.lerp(a, b, alpha, out=out)
        return
    unit_a, unit_b = a / norm_a, b / norm_b
    # Kahan's form: acos of the dot product loses half the digits near 0.
    torch.sub(unit_a, unit_b, out=out)
    apart = float(torch.linalg.vector_norm(out))
    torch.add(unit_a, unit_b, out=out)
    angle = 2 * math.atan2(apart, float(torch.linalg.vector_norm(out)))
    if math.sin(angle) < _FLAT:
        torch.lerp(a, b, alpha, out=out)
        return
    size = ((1 - alpha) * norm_a + alpha * norm_b) / math.sin(angle)
    torch.mul(unit_a, math.sin((1 - alpha) * angle) * size, out=out)
    out.add_(unit_b, alpha=math.sin(alpha * angle) * size)


def bislerp(
    models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, *, base: torch.Tensor, strength: float
) -> None:
    """base + strength slerp(A - base, B - base; alpha): spherical in the space of differences, where angles
    mean something (fine-tunes are nearly parallel as weights). Degenerate cases as slerp's.

    At strength 1, alpha 0 is exactly A and alpha 1 exactly B; a negative strength moves away from both.
    """
    a, b = models
    if strength == 1.0 and alpha in (0.0, 1.0):
        out.copy_(b if alpha else a)
        return
    slerp((a - base, b - base), alpha, out)
    out.mul_(strength).add_(base)


def rotate(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """A turned towards B: R(alpha) A, where R(1) is the orthogonal matrix with the least |R A - B|
    (orthogonal Procrustes, Schönemann 1966: U V^T of the SVD of B A^T), and R(alpha) the orthogonal matrix
    nearest to (1 - alpha) I + alpha R(1).

    Matrices are (outputs, everything else); the shorter side is turned. Singular values stay A's, so alpha 1
    is not B. Tensors with fewer than two dimensions (biases, norms) are weighted sums.
    """
    import torch

    a, b = models
    if alpha == 0.0 or torch.equal(a, b):
        out.copy_(a)
        return
    if a.ndim < 2 or min(a.shape[0], a[0].numel()) < 2:
        torch.lerp(a, b, alpha, out=out)
        return
    one, two = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    turned = one.shape[0] > one.shape[1]
    if turned:
        one, two = one.T, two.T
    rotation = _orthogonal(two @ one.T)
    if alpha != 1.0:
        identity = torch.eye(len(rotation), dtype=a.dtype, device=a.device)
        rotation = _orthogonal(torch.lerp(identity, rotation, alpha))
    result = rotation @ one
    out.copy_((result.T if turned else result).reshape(out.shape))


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of the polar decomposition."""
    import torch

    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def cosine_a(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """B + k (A - B) with k = clamp(cos(A, B) - alpha, 0, 1), the cosine taken down each column (axis 0).

    Where the models agree A's structure is kept, elsewhere B's detail: sd-mecha's add_cosine_a (cosine.py @34203e59).
    supermerger's "cosineA" (@b9229d75), where the idea is from, has other numbers: it takes the mean of the column's
    cosine and of all columns' mean cosine, maps the model's own range of cosines (from the 1st to the 99th percentile
    over all tensors but the VAE's) to 0..1 before alpha is taken off, and leaves the VAE alone (here: --keep vae). The
    range would make every tensor depend on all others, so it is left out here as in sd-mecha.

    alpha 1 is B; alpha 0 is not A. A column of zeros has cosine 0.
    """
    _cosine(models, alpha, out, whole=False)


def cosine_b(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor) -> None:
    """As cosine_a, with the mean of the column's cosine and the whole tensor's: sd-mecha's add_cosine_b, and
    supermerger's "cosineB" without its range over the model.
    """
    _cosine(models, alpha, out, whole=True)


def _cosine(models: Sequence[torch.Tensor], alpha: float, out: torch.Tensor, whole: bool) -> None:
    import torch
    from torch.nn.functional import cosine_similarity

    a, b = models
    if alpha == 1.0:
        out.copy_(b)
        return
    one, two = (a.reshape(1), b.reshape(1)) if a.ndim == 0 else (a, b)
    similarity = cosine_similarity(one, two, dim=0)
    if whole:
        similarity = (similarity + cosine_similarity(one.flatten(), two.flatten(), dim=0)) / 2
    share = (similarity - alpha).clamp_(0, 1)
    torch.lerp(two, one, share.expand_as(one), out=out.reshape(one.shape))
