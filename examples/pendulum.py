"""Length and damping of a pendulum from 32 noisy measurements of its angle.

Trains a net with lateral connections and a feed-forward net of as many parameters, prints their errors on new pendulums
and draws one of these to pendulum.png: measured, and simulated again with the parameters that the net has found. The
whole study, with 30 seeds and statistics, is the command `implicit-rnn pendulum`. With the environment variable
IMPLICIT_RNN_EXAMPLES=small this takes a few seconds on any machine.
"""

import os

import matplotlib.pyplot as plt
import numpy as np

import implicit_rnn as irnn
from implicit_rnn.experiments.pendulum.simulation import TIMES, measure, trajectories

SMALL = os.environ.get("IMPLICIT_RNN_EXAMPLES") == "small"
PENDULUMS, EPOCHS = (200, 30) if SMALL else (1000, 300)

rng = np.random.default_rng(0)
train, validation, test = measure(PENDULUMS, rng), measure(500, rng), measure(1000, rng)

mean, scale = train.measured.mean(axis=0), (train.measured - train.measured.mean(axis=0)).std()
middle, spread = train.parameters.mean(axis=0), train.parameters.std(axis=0)


def scaled(pendulums):
    """Inputs and targets as the networks see them."""
    return (pendulums.measured - mean) / scale, (pendulums.parameters - middle) / spread


nets = {
    "feed-forward": irnn.Network(32, [irnn.Layer(42, lateral=False)], outputs=2, seed=0),
    "lateral": irnn.Network(32, [irnn.Layer(24)], outputs=2, seed=0),
}
for name, net in nets.items():
    run = net.fit(
        *scaled(train),
        optimizer=irnn.Adam(1e-2),
        schedule="cosine",
        epochs=EPOCHS,
        batch_size=100,
        clip=1.0,
        validation=scaled(validation),
        validation_every=10,
        restore_best=True,
    )
    found = middle + spread * net.predict(scaled(test)[0])
    errors = np.sqrt(((found - test.parameters) ** 2).mean(axis=0))
    print(
        f"{name:<12} {net.parameters.size} parameters, {run.seconds:.1f} s: "
        f"length +/- {errors[0]:.3f} m, damping +/- {errors[1]:.3f} 1/s"
    )

shown = 3
again = trajectories(*found[shown : shown + 1].T, test.release[shown : shown + 1])[0]
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(TIMES, test.measured[shown], "o", color="black", markersize=4, label="measured")
ax.plot(TIMES, again, color="#c8442d", label=f"simulated with {found[shown, 0]:.2f} m and {found[shown, 1]:.2f} 1/s")
ax.set(xlabel="time / s", ylabel="angle / rad")
ax.legend(frameon=False)
figure.savefig("pendulum.png", dpi=150)
