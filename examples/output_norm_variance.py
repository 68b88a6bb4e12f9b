"""Plot the variance of |z|^2 of a random sparse ReLU layer against its fan-in: closed forms and simulation.

python examples/output_norm_variance.py output_norm_variance.png
"""

from __future__ import annotations

import sys

import matplotlib as mpl

from fanin_compile.train.theory import MASK_LAWS, output_norm_variance, simulate_output_norm

mpl.use("Agg")
import matplotlib.pyplot as plt

N = 16
FAN_INS = (1, 2, 3, 4, 6, 8, 12, 16)


def main(path: str, samples: int = 50_000) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    print(f"n = {N}; closed form / simulation with its standard deviation, {samples} layers each")
    for law in MASK_LAWS:
        exact = [output_norm_variance(N, k, law) for k in FAN_INS]
        found = [simulate_output_norm(N, k, law, samples) for k in FAN_INS]
        (line,) = axes.plot(FAN_INS, exact, label=law)
        values, errors = [s.variance for s in found], [2 * s.variance_error for s in found]
        axes.errorbar(FAN_INS, values, errors, fmt="o", markersize=3, capsize=2, color=line.get_color())
        for k, value, s in zip(FAN_INS, exact, found, strict=True):
            print(f"{law:>10}  k = {k:2}  {value:.4f} / {s.variance:.4f} ± {s.variance_error:.4f}")
    axes.set(
        xlabel="fan-in k", ylabel="Var |z|²", title=f"Output norm of a sparse layer, n = {N}", xscale="log"
    )
    axes.legend(title="mask: constant")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "output_norm_variance.png")
