r"""Why a constant fan-in: the variance of a random sparse layer's output norm, in closed form.

A layer of n inputs and n outputs, k inputs per neuron on average, after Lasby et al. (ICLR 2024, section 3.2):

    z_i = sqrt(2/k) * xi_i * sum_j I_ij w_ij u_j,   i = 1..n

with u uniform on the unit sphere of R^n, w_ij ~ N(0, 1), xi_i ~ Bernoulli(1/2) (a ReLU at random signs), all
independent, and I the 0/1 mask. How noisy |z|^2 is decides how far a deep network's signal drifts; the masks differ
only in the joint law of the I_ij.

**One neuron.** Given I and u, sum_j I_ij w_ij u_j is N(0, S_i) with S_i = sum_j I_ij u_j^2, so that, xi^2 = xi,

    E[z_i^2 | I, u] = (2/k) (1/2) S_i = S_i / k,     E[z_i^4 | I, u] = (4/k^2) (1/2) 3 S_i^2 = 6 S_i^2 / k^2,

and z_i, z_m are independent given I and u. On the sphere, with every E below over u,

    E[u_j^2] = 1/n,     E[u_j^4] = 3 / (n(n+2)),     E[u_j^2 u_l^2] = 1 / (n(n+2))  for j != l.

E|z|^2 = sum_i E[S_i] / k = n (k/n) / k = 1 for every mask whose entries have mean p = k/n. So

    Var|z|^2 = n E[z_i^4] + n(n-1) E[z_i^2 z_m^2] - 1
             = (6n/k^2) E[S_i^2] + (n(n-1)/k^2) E[S_i S_m] - 1.                                            (1)

**Second moments of S.** Let q = E[I_ij I_il] (j != l, one neuron), r = E[I_ij I_mj] (one input, two neurons) and
t = E[I_ij I_ml] (neither shared). Then, as I_ij^2 = I_ij,

    E[S_i^2]   = (3 n p + n(n-1) q) / (n(n+2)) = (3k/n + (n-1) q) / (n+2),                                 (2)
    E[S_i S_m] = (3 n r + n(n-1) t) / (n(n+2)) = (3r + (n-1) t) / (n+2).                                   (3)

The three masks:

* *Bernoulli*, every entry by itself with p: q = r = t = p^2. Then E[S_i S_m] = p^2 and
  E[S_i^2] = (3p + (n-1) p^2) / (n+2), and (1) becomes 6n(3k/n + (n-1)k^2/n^2) / (k^2 (n+2)) + (n-1)/n - 1
  = (18/k + 6(n-1)/n)/(n+2) - 1/n = (5n - 8 + 18 n/k) / (n(n+2)).

* *Constant per layer*, nk of the n^2 entries: any two different entries have
  q = r = t = (nk/n^2) (nk-1)/(n^2-1) = p^2 C with C = (1 - 1/(nk)) / (1 - 1/n^2) = (n - 1/k)/(n - 1/n).
  (1) is then (18/k + 6(n-1)C/n)/(n+2) + (n-1)C/n - 1 = ((n^2+7n-8) C + 18 n/k - n^2 - 2n) / (n(n+2)),
  because 6(n-1) + (n-1)(n+2) = n^2 + 7n - 8.

* *Constant fan-in*, k of the n inputs of each neuron, neurons independent: q = p (k-1)/(n-1), r = t = p^2. (2) is
  (3k/n + k(k-1)/n)/(n+2) = k(k+2) / (n(n+2)), and (1) becomes 6(k+2)/(k(n+2)) + (n-1)/n - 1
  = 6(k+2)/(k(n+2)) - 1/n, which is the Bernoulli value less 6(n-k)/(k n (n+2)).

Constant fan-in is the least noisy of the three, by more the sparser the layer: Bernoulli lets the fan-in itself
vary, and a constant count per layer takes away only the little of it that all neurons share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fanin_compile.errors import OptionError

MaskLaw = Literal["bernoulli", "per layer", "fan-in"]
MASK_LAWS: tuple[MaskLaw, ...] = get_args(MaskLaw)


def _check(n: int, k: int, law: str) -> None:
    if not 1 <= k <= n or n < 2:
        raise OptionError(f"n={n}, k={k}; expected 1 <= k <= n and n >= 2")
    if law not in MASK_LAWS:
        raise OptionError(f"mask law is {law!r}; expected one of {', '.join(MASK_LAWS)}")


def output_norm_variance(n: int, k: int, law: MaskLaw) -> float:
    """Var|z|^2 in closed form; see the derivation above.

    >>> output_norm_variance(10, 2, "bernoulli")
    1.1
    """
    _check(n, k, law)
    if law == "bernoulli":
        return (5 * n - 8 + 18 * n / k) / (n * (n + 2))
    if law == "per layer":
        c = (n - 1 / k) / (n - 1 / n)
        return ((n * n + 7 * n - 8) * c + 18 * n / k - n * n - 2 * n) / (n * (n + 2))
    return 6 * (k + 2) / (k * (n + 2)) - 1 / n


def _masks(n: int, k: int, law: MaskLaw, samples: int, generator: torch.Generator) -> Tensor:
    """Float 0/1 [samples, n, n] drawn from the law."""
    score = torch.rand(samples, n, n, generator=generator, dtype=torch.float64)
    if law == "bernoulli":
        return (score < k / n).double()
    flat = score.view(samples, 1, n * n) if law == "per layer" else score
    kept = flat.topk(n * k if law == "per layer" else k, dim=-1).indices
    return torch.zeros_like(flat).scatter_(-1, kept, 1.0).view(samples, n, n)


@dataclass(frozen=True)
class Simulated:
    """Sample mean and variance of |z|^2, each with the standard deviation of its own estimate."""

    mean: float
    mean_error: float
    variance: float
    variance_error: float


def simulate_output_norm(n: int, k: int, law: MaskLaw, samples: int, seed: int = 0) -> Simulated:
    """Monte-Carlo of |z|^2 from its definition, ``samples`` independent layers and inputs.

    The error of the variance is sqrt((m4 - v^2) / samples), m4 the fourth central moment.
    """
    _check(n, k, law)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for size in (min(20_000, samples - done) for done in range(0, samples, 20_000)):
        u = torch.nn.functional.normalize(
            torch.randn(size, n, 1, generator=generator, dtype=torch.float64), dim=1
        )
        w = torch.randn(size, n, n, generator=generator, dtype=torch.float64)
        xi = torch.randint(0, 2, (size, n), generator=generator)
        sums = ((_masks(n, k, law, size, generator) * w) @ u).squeeze(-1)
        parts.append((2 / k) * (xi * sums.square()).sum(dim=1))
    norms = torch.cat(parts)
    centred = norms - norms.mean()
    variance = centred.square().mean()
    spread = centred.pow(4).mean() - variance.square()
    return Simulated(
        mean=float(norms.mean()),
        mean_error=float((variance / samples).sqrt()),
        variance=float(variance),
        variance_error=float((spread / samples).sqrt()),
    )
