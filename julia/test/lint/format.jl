# Whether the Julia code is formatted as Runic.jl does it; `--inplace` as the argument does it.
#
#     julia --project=julia/test/lint -e 'using Pkg; Pkg.instantiate()'      once
#     julia --project=julia/test/lint julia/test/lint/format.jl

using Runic

const PACKAGE = dirname(dirname(@__DIR__))

exit(Runic.main(isempty(ARGS) ? ["--check", "--diff", PACKAGE] : [ARGS; PACKAGE]))
