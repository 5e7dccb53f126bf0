"""Julia in this process: which one, its start, its threads, and how Ctrl-C stops it.

- ``environments``: the Julia and the packages to use, found and checked before anything is started
- ``start``: the Julia that runs, and the one way into it
- ``sources``: where the Julia sources of this package are compiled, once for all installations
- ``threads``: how many, and whose signals are whose
- ``interrupt``: Ctrl-C
- ``install``: what juliapkg does, in a process of its own, with its progress
- ``package_server``: whether packages can be had
- ``gpu``: CUDA.jl for an environment, and the self-test of a card
- ``setup``, ``doctor``: `implicit-rnn setup` and `implicit-rnn doctor`
"""
