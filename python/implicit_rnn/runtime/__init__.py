"""Julia in this process: which one, its start, its threads, and how Ctrl-C stops it.

- ``environments``: the Julia and the packages to use, found and checked before anything is started
- ``embedded``: the Julia that runs, and the one way into it
- ``threads``: how many, and whose signals are whose
- ``interrupt``: Ctrl-C
- ``commands``: `implicit-rnn setup` and `implicit-rnn doctor`
"""
