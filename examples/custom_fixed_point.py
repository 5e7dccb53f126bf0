"""Kepler's equation for a million orbits, with its gradient: the solvers behind the networks, on an equation of one's own.

E - e sin E = M has no closed form. irnn.root solves it for all samples at once, and the implicit function theorem gives
derivatives without going back through the iterations. Here they find the eccentricity of an orbit from measured
distances, and the answer is drawn to custom_fixed_point.png. With the environment variable IMPLICIT_RNN_EXAMPLES=small
there are fewer orbits.
"""

import os
import time

import matplotlib.pyplot as plt
import numpy as np

import implicit_rnn as irnn

SMALL = os.environ.get("IMPLICIT_RNN_EXAMPLES") == "small"
ORBITS = 10_000 if SMALL else 1_000_000

# --- the equation: Julia code, compiled once, or a Python function on arrays where there is no Julia ---------------

if irnn.get_engine().name == "julia":
    kepler, how = irnn.julia("(E, M, e) -> E .- e .* sin.(E) .- M"), {}
else:
    kepler, how = lambda E, M, e: E - e * np.sin(E) - M, {"vectorized": True}


def eccentric_anomaly(M, e):
    """The solution E of Kepler's equation for mean anomalies M (B, 1); e is one number, or one per sample (B, 1)."""
    batched = ("M", "e") if np.ndim(e) else ("M",)
    return irnn.root(kepler, M + 0.8 * np.sin(M), args=(M, e), batched=batched, **how)


# --- a million solutions and their gradient ------------------------------------------------------------------------

rng = np.random.default_rng(0)
M, e = rng.uniform(-np.pi, np.pi, (ORBITS, 1)), rng.uniform(0, 0.9, (ORBITS, 1))
eccentric_anomaly(M[:10], e[:10])  # compiles

begin = time.perf_counter()
orbits = eccentric_anomaly(M, e)
solved = time.perf_counter()
gradient = orbits.vjp(np.ones_like(M))
end = time.perf_counter()

E = orbits.value
print(f"{ORBITS} orbits solved in {solved - begin:.2f} s, gradient in {end - solved:.2f} s")
print(f"largest error of the equation  {np.abs(E - e * np.sin(E) - M).max():.1e}")
print(f"largest error of dE/dM         {np.abs(gradient['M'] - 1 / (1 - e * np.cos(E))).max():.1e}")
print(f"largest error of dE/de         {np.abs(gradient['e'] - np.sin(E) / (1 - e * np.cos(E))).max():.1e}")

# --- the eccentricity of an orbit from measured distances ----------------------------------------------------------

TRUE, NOISE = 0.6, 0.02
phases = np.sort(rng.uniform(-np.pi, np.pi, (200, 1)), axis=0)
distances = 1 - TRUE * np.cos(eccentric_anomaly(phases, TRUE).value) + NOISE * rng.standard_normal(phases.shape)

found = 0.1
for _ in range(8):  # Gauss and Newton's method in one unknown
    solution = eccentric_anomaly(phases, np.full_like(phases, found))
    E, change = solution.value, solution.vjp(np.ones_like(phases))["e"]
    residual = 1 - found * np.cos(E) - distances
    slope = -np.cos(E) + found * np.sin(E) * change
    found = float(np.clip(found - (slope * residual).sum() / (slope**2).sum(), 0, 0.95))
print(f"eccentricity {found:.4f} +/- {NOISE / np.sqrt((slope**2).sum()):.4f}, true {TRUE}")

figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(phases, distances, ".", color="black", markersize=4, label="measured")
ax.plot(phases, 1 - found * np.cos(eccentric_anomaly(phases, found).value), color="#c8442d", label=f"e = {found:.3f}")
ax.set(xlabel="mean anomaly / rad", ylabel="distance / semi-major axis")
ax.legend(frameon=False)
figure.savefig("custom_fixed_point.png", dpi=150)
