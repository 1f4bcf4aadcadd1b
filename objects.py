"""From the evidence of a video's frames to its labels: one object, one class.

An object never changes its class, so the classes of a video are estimated from all of its frames
together before any pixel gets its label: a class that turns up here and there on others is not in
the video.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, factors

NUM_KINDS = NUM_CLASSES - 1  # 48 kinds of object
SAMPLE = 2048  # object pixels of a video that its classes are estimated from
ROUNDS = 50  # of that estimate; stray classes fade slowly, fewer than 20 leave some
DOUBTFUL = 30  # object pixels, in all frames together, that halve the doubt in a class
CHUNK = 2**18  # object pixels at a time, which bounds the memory for long videos


def membership() -> Tensor:
    """Return which of the 13 logits each class adds up, (13, 48), 0 or 1."""
    shape, material, colour = factors(torch.arange(1, NUM_CLASSES))
    kinds = zip((shape, material, colour), FACTOR_SIZES, strict=True)
    return torch.cat([F.one_hot(factor, size) for factor, size in kinds], dim=1).float().T


@torch.inference_mode()
def consistent_labels(objects: Tensor, evidence: Tensor) -> Tensor:
    """Label the object pixels of one video by what they and all the others say together.

    The share of each class among the object pixels is estimated by expectation maximisation
    (Saerens, Latinne and Decaestecker 2002, https://doi.org/10.1162/089976602753284446): classes
    that only come second, or first on scattered pixels, fade. For the labels, any class with
    clearly more than DOUBTFUL pixels then counts alike, so that an object which is seen briefly
    holds its own against one that is seen always.

    Args:
        objects: (T, H, W) bool, where there is an object; that does not change.
        evidence: (N, 13), for each such pixel the logits of 3 shapes, 2 materials and 8 colours.

    Returns:
        (T, H, W) uint8, ids 0..48.
    """
    labels = objects.to(torch.uint8)
    if not len(evidence):
        return labels
    members = membership().to(evidence.device)
    sample = evidence[:: 1 + len(evidence) // SAMPLE].float()
    p = (sample @ members).softmax(dim=1)  # (n, 48), of a class in a pixel of an object
    share = torch.full_like(p[0], 1 / NUM_KINDS)
    for _ in range(ROUNDS):
        share = share * (p.T @ (1 / (p @ share))) / len(p)
    pixels = share * len(evidence)  # in all frames
    classes = (pixels >= pixels.max().clamp(max=0.5)).nonzero()[:, 0]
    prior = (pixels / (pixels + DOUBTFUL)).log()[classes]
    best = [
        (part.float() @ members[:, classes] + prior).argmax(dim=1) for part in evidence.split(CHUNK)
    ]
    return labels.masked_scatter(objects, (classes + 1).to(torch.uint8)[torch.cat(best)])
