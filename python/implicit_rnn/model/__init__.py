"""What a network is and how it learns: topology, activations, constraints, losses and optimisers."""
