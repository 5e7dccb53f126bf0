# Vectors of a few entries that need no memory. StaticArrays.jl has them too, but it takes 0.7 to 1.0 s to load, where
# ForwardDiff.jl takes 0.3 to 0.5 s, and only twenty lines are needed here.

"Entries of the longest [`Short`](@ref)."
const MAX_SHORT = 8

"""
    Short{N, T}

A vector of N entries, at most $(MAX_SHORT), that lives in registers. `f` is given these for z and for vector arguments of that length,
so that a broadcast formula such as `a .* sin.(z)` allocates nothing; every other operation on it returns an `Array`.
"""
struct Short{N, T} <: AbstractVector{T}
    entries::NTuple{N, T}
    Short(entries::Tuple{T, Vararg{T, M}}) where {T, M} = new{M + 1, T}(entries)
end
@inline Short(entry::T, entries::T...) where {T} = Short((entry, entries...))
@inline Short(entries...) = Short(promote(entries...))

Base.size(::Short{N}) where {N} = (N,)
Base.IndexStyle(::Type{<:Short}) = IndexLinear()
Base.@propagate_inbounds Base.getindex(x::Short, i::Int) = x.entries[i]

struct ShortStyle{N} <: Broadcast.AbstractArrayStyle{1} end
ShortStyle{N}(::Val{1}) where {N} = ShortStyle{N}()
ShortStyle{N}(::Val{M}) where {N, M} = Broadcast.DefaultArrayStyle{M}()
Base.BroadcastStyle(::Type{<:Short{N}}) where {N} = ShortStyle{N}()
Base.BroadcastStyle(style::ShortStyle, ::Broadcast.DefaultArrayStyle{0}) = style
Base.BroadcastStyle(::ShortStyle, style::Broadcast.DefaultArrayStyle{1}) = style
Base.BroadcastStyle(::ShortStyle{N}, ::ShortStyle{M}) where {N, M} =
    N == 1 ? ShortStyle{M}() : M == 1 ? ShortStyle{N}() : Broadcast.DefaultArrayStyle{1}()
@inline Base.copy(b::Broadcast.Broadcasted{ShortStyle{N}}) where {N} = Short(ntuple(i -> (@inline; @inbounds b[i]), Val(N))...)
