"""Julia in this process: its choice and start, its threads, and how Ctrl-C stops it.

- ``environments``: the Julia and the packages to use, found and checked before anything is started
- ``start``: the running Julia, and the only way to call it
- ``sources``: where the Julia sources of this package are compiled, once for all installations
- ``threads``: the number of threads, and which signals Julia and Python handle
- ``interrupt``: Ctrl-C
- ``install``: installation by juliapkg, in a separate process, with its progress
- ``package_server``: whether packages can be downloaded
- ``gpu``: CUDA.jl for an environment, and the self-test of a card
- ``setup``, ``doctor``: `implicit-rnn setup` and `implicit-rnn doctor`
"""
