"""Likelihood of images by integration over a latent of one or two dimensions: the exact value that bounds bound.

    log p(x) = log of the integral of p(x|z) N(z; 0, I) over z

by the trapezoidal rule on a square grid, in fp64. For a smooth integrand that has died out at the ends its error falls
exponentially with the number of points (Trefethen & Weideman, SIAM Review 2014), until the spacing is about the width
of the narrowest posterior; the rule with every second point of the same grid says whether it has.

Legend: N images, M points, c latent dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

REACH = 7.0  # deviations of the prior: beyond them lies 3e-12 of it


def log_evidence(
    log_likelihood: Callable[[torch.Tensor], torch.Tensor], dimensions: int, steps: int, reach: float = REACH
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(x), by how much half of the points in each dimension change it), in nats, fp64 [N].

    Args:
        log_likelihood: z [M, c] => log p(x|z) of every image [M, N].
        dimensions: c. The work is (steps + 1) ** c decodes.
        steps: intervals from -reach to reach; even.
    """
    assert steps % 2 == 0
    line = torch.linspace(-reach, reach, steps + 1, dtype=torch.float64)
    cell = math.log(2 * reach / steps)
    constant = -0.5 * math.log(2 * math.pi)
    sums = []
    # one line of the grid at a time, its first coordinates fixed
    for place in itertools.product(range(steps + 1), repeat=dimensions - 1):
        first = line[list(place)].expand(steps + 1, dimensions - 1)
        z = torch.cat([first, line[:, None]], dim=1)
        joint = log_likelihood(z).double() + (constant - 0.5 * z.square()).sum(dim=1, keepdim=True)
        every_second = all(at % 2 == 0 for at in place)
        coarse = joint[::2].logsumexp(dim=0) if every_second else torch.full_like(joint[0], -torch.inf)
        sums.append(torch.stack([joint.logsumexp(dim=0), coarse]))
    fine, coarse = torch.stack(sums).logsumexp(dim=0)
    found = fine + dimensions * cell
    return found, coarse + dimensions * (cell + math.log(2)) - found
