"""XOR with one layer of two neurons: lateral connections do what a feed-forward layer cannot.

Prints how many of the nets have learnt it and draws the best one to xor.png. With the environment variable
IMPLICIT_RNN_EXAMPLES=small it takes a few seconds on any machine.
"""

import os

import matplotlib.pyplot as plt
import numpy as np

import implicit_rnn as irnn
from implicit_rnn import plotting

SMALL = os.environ.get("IMPLICIT_RNN_EXAMPLES") == "small"
NETS, EPOCHS = (3, 300) if SMALL else (50, 2000)

X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
Y = np.array([[-0.9], [0.9], [0.9], [-0.9]])


def train(lateral: bool) -> tuple[list[irnn.Network], list[irnn.Run]]:
    """Nets of one layer of two tanh neurons, of which the first is the output, from different initial weights."""
    nets = [irnn.Network(2, [irnn.Layer(2, lateral=lateral)], outputs=[0], seed=seed) for seed in range(NETS)]
    return nets, irnn.fit_many(nets, X, Y, optimizer=irnn.Adam(0.03), epochs=EPOCHS, progress=False)


for lateral in (False, True):
    nets, runs = train(lateral)
    solved = [np.array_equal(np.sign(net.predict(X)), np.sign(Y)) for net in nets]
    print(
        f"{'with' if lateral else 'without'} lateral connections: {sum(solved)} of {NETS} nets have all four signs right"
    )

best = int(np.argmin([run.loss[-1] for run in runs]))
print(f"weights in force of the best one:\nW =\n{nets[best].input_weights}\nR =\n{nets[best].recurrent_weights}")

figure, (surface, graph, curve) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
plotting.decision_surface(nets[best], surface, X, Y[:, 0])
plotting.topology(nets[best], graph)
plotting.loss_curve(runs[best], curve)
figure.savefig("xor.png", dpi=150)
