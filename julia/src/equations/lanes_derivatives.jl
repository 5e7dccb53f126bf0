# Derivatives of the solutions of many samples by the implicit function theorem, side by side and on all threads.

"The most entries of z and its arguments whose derivatives are found side by side."
const MOST_VARIABLES = 2 * MAX_SHORT

# Entries by which to differentiate; -1: not side by side.
variables(x::Union{AbstractFloat, Vec}) = 1
variables(::Short{N, <:Union{AbstractFloat, Vec}}) where {N} = N
variables(x) = 0
variables(::AbstractArray{<:AbstractFloat}) = -1

# x with its entries as variables number O + 1, … of N.
@inline as_variables(x::Union{AbstractFloat, Vec}, ::Val{O}, N::Val) where {O} = variable(Vec(x), O + 1, N)
@inline as_variables(x::Short{M, <:Union{AbstractFloat, Vec}}, ::Val{O}, N::Val) where {M, O} =
    Short(ntuple(i -> variable(Vec(x[i]), O + i, N), Val(M)))
@inline as_variables(x, ::Val, ::Val) = x
@inline all_as_variables(::Tuple{}, ::Val, ::Val) = ()
@inline all_as_variables(args::Tuple, ::Val{O}, N::Val) where {O} = (
    as_variables(args[1], Val(O), N), all_as_variables(tail(args), Val(O + variables(args[1])), N)...,
)
@inline count_variables(args::Tuple) = sum(map(variables, args); init = 0)

"Where the variables of each argument begin."
@inline offsets(n::Int, ::Tuple{}) = ()
@inline offsets(n::Int, args::Tuple) = (n, offsets(n + variables(args[1]), tail(args))...)

differentiates_side_by_side(::AbstractEquation, inverses) = false
differentiates_side_by_side(::Equation{T, -1}, inverses) where {T} = false
function differentiates_side_by_side(p::Equation{T, K}, inverses) where {T, K}
    runs_side_by_side(p, inverses.Z) || return false
    args = arguments(p, Block(1, 1))
    return all(x -> variables(x) >= 0, args) && K + count_variables(args) <= MOST_VARIABLES
end

"""
    linearize!(w, p, inverses, b, wanted)

w.B = A⁻¹ of the samples of a block; returns the jets of f with respect to all variables, and for which of the `wanted` samples A⁻¹ was
found; `inverse!` explains the failures. Samples known to be regular are not checked again.
"""
@inline function linearize!(w::LaneBuffers, p::Equation{T, K}, inverses::Inverses{T}, b::Block, wanted::Mask, root::Val{R}) where {T, K, R}
    z, args = load_columns(inverses.Z, b, Val(K)), arguments(p, b)
    N = Val(K + count_variables(args))
    y = checked(@inline(p.f(as_variables(z, Val(0), N), all_as_variables(args, Val(K), N)...)), K)
    put_derivatives!(w.J, y, root, Val(K))
    for k in 1:K, i in 1:K
        @inbounds w.B[i, k] = Vec(i == k)
    end
    known = all(j -> @inbounds(inverses.regular[j]), samples(b))
    size_of_A = known ? zero(Vec) : column_sum(w.J, Val(K))
    invert!(w.J, w.B, Val(K))
    # Of an infinite derivative by an argument all others of a jet are NaN.
    return y, known ? wanted & is_found(w.B, Val(K)) : wanted & prove_regular!(w, p, inverses, z, args, b, y, size_of_A, root)
end

@noinline function prove_regular!(w::LaneBuffers, p::Equation{T, K}, inverses, z, args, b::Block, y, size_of_A::Vec, root::Val{R}) where {T, K, R}
    # Less is left to `inverse!`, which equilibrates A.
    regular = size_of_A * column_sum(w.B, Val(K)) * Float64(eps(T) * K) < 0.01
    c = ntuple(i -> in_doubt(value_of(y[i]) - (R ? zero(Vec) : z[i]), Float64(eps(T)) * largest_term(y[i], args, Val(K))), Val(K))
    errors = ntuple(i -> sum(ntuple(k -> @inbounds(w.B[i, k]) * c[k], Val(K))), Val(K))
    there = Short(ntuple(i -> z[i] - errors[i] - beyond(z[i], errors[i], Float64(eps(T))), Val(K)))
    way, found = minus(there, z), evaluate!(w.J, p, there, args, root)
    change = ntuple(i -> found[i] - value_of(y[i]) - (R ? zero(Vec) : way[i]), Val(K))
    regular &= deviation(w.B, w.J, Val(K)) <= LARGEST_CHANGE
    regular &= reduce(&, ntuple(k -> responds(sum(ntuple(i -> @inbounds(w.B[k, i]) * change[i], Val(K))), way[k]), Val(K)))
    for (l, j) in enumerate(samples(b))
        @inbounds inverses.regular[j] = lane(regular, l)
    end
    return regular
end

# Else `is_hidden!` is asked.
@inline responds(found::Vec, way::Vec) = (way == 0.0) | (2.0 * abs(found - way) <= abs(way))

# Like `terms_of_arguments!`, by the existing derivatives.
@inline largest_term(y, ::Tuple{}, ::Val) = zero(Vec)
@inline largest_term(y, args::Tuple, ::Val{O}) where {O} =
    max(term(y, args[1], O), largest_term(y, tail(args), Val(O + variables(args[1]))))
@inline term(y, x::Union{AbstractFloat, Vec}, o::Int) = abs(partial_of(y, o + 1) * x)
@inline term(y, x::Short{M, <:Union{AbstractFloat, Vec}}, o::Int) where {M} = reduce(max, ntuple(i -> abs(partial_of(y, o + i) * x[i]), Val(M)))
@inline term(y, x, o::Int) = zero(Vec)

@inline in_doubt(c::Vec, doubt::Vec) = c + ifelse(c < 0.0, -doubt, doubt)

# One unknown needs no loops.
@inline column_sum(A::Matrix{Vec}, ::Val{1}) = abs(@inbounds A[1])
@inline column_sum(A::Matrix{Vec}, ::Val) = largest_column_sum(A)
@inline invert!(A::Matrix{Vec}, B::Matrix{Vec}, ::Val{1}) = @inbounds B[1] = inv(A[1])
@inline invert!(A::Matrix{Vec}, B::Matrix{Vec}, ::Val{K}) where {K} = divide!(A, B, K)
@inline is_found(B::Matrix{Vec}, ::Val{1}) = isfinite(@inbounds B[1])
@inline is_found(B::Matrix{Vec}, ::Val) = mapreduce(isfinite, &, B)
@inline deviation(B::Matrix{Vec}, A::Matrix{Vec}, ::Val{1}) = @inbounds abs(B[1] * A[1] - 1.0)
@inline deviation(B::Matrix{Vec}, A::Matrix{Vec}, ::Val) = largest_deviation(B, A)

# The largest column sum of B A - I.
function largest_deviation(B::Matrix{Vec}, A::Matrix{Vec})
    n, largest = size(A, 1), zero(Vec)
    @inbounds for j in 1:n
        total = zero(Vec)
        for i in 1:n
            entry = Vec(-(i == j))
            for k in 1:n
                entry = muladd(B[i, k], A[k, j], entry)
            end
            total += abs(entry)
        end
        largest = max(largest, total)
    end
    return largest
end

# --- vjp -------------------------------------------------------------------------------------------------------

function vjp_side_by_side!(gradients::Tuple, p::Equation{T, K}, inverses::Inverses{T}, v::Matrix{T}) where {T, K}
    total, threads, missed = size(v, 2), Threads.nthreads(), MISSED_GUARDS[]
    buffers = [(LaneBuffers(K), InverseBuffers{T}(K)) for _ in 1:threads]
    pieces = cld(total, PIECE)
    own = [map(own_gradient, gradients, p.args) for _ in 1:pieces]
    find_pieces(pieces, threads) do thread, k
        vjp_piece!(own[k], buffers[thread]..., p, inverses, v, piece(k, PIECE, total), is_root(p))
    end
    # Added in this order, whatever the number of threads.
    for (i, x) in enumerate(p.args)
        x isa Shared && eltype(gradients[i]) <: AbstractFloat || continue
        fill!(gradients[i], 0)
        foreach(g -> gradients[i] .+= g[i], own)
    end
    missed == MISSED_GUARDS[] || all(g -> all(isfinite, g), gradients) || @late vjp_one_by_one!(gradients, p, inverses, v)
    return gradients
end

own_gradient(g, ::PerSample) = g
own_gradient(g, ::Shared) = eltype(g) <: AbstractFloat ? zero(g) : g

# `work` on all pieces, in order, until enough samples are known to be singular for an error to name; they are the first.
function find_pieces(work, pieces::Int, threads::Int)
    singular, count = [Int[] for _ in 1:pieces], Threads.Atomic{Int}(0)
    in_parallel(pieces, threads) do thread, k
        count[] > MOST_NAMED && return
        note_singular!(() -> work(thread, k), singular[k], typemax(Int))
        Threads.atomic_add!(count, length(singular[k]))
    end
    throw_singular(foldl(append!, singular; init = Int[]))
    return
end

function vjp_piece!(gradients::Tuple, w::LaneBuffers, one::InverseBuffers, p::Equation{T, K}, inverses, v, range, root) where {T, K}
    sums, singular = map(x -> zeros(Vec, x isa Shared ? max(variables(x.value), 0) : 0), p.args), Int[]
    for sample in first(range):LANES:last(range)
        check_interrupt()
        b = Block(sample, last(range))
        vs = load_columns(v, b, Val(K))
        wanted = reduce(|, map(x -> !(x == 0.0), vs.entries))
        if !any(wanted)
            map((g, x) -> x isa PerSample && fill_block!(g, b), gradients, p.args)
            continue
        end
        y, regular = linearize!(w, p, inverses, b, wanted, root)
        λ = ntuple(k -> ifelse(regular, -sum(ntuple(i -> @inbounds(w.B[i, k]) * vs[i], Val(K))), zero(Vec)), Val(K))
        product(o) = ifelse(regular, sum(ntuple(i -> λ[i] * partial_of(y[i], o), Val(K))), zero(Vec))
        map((g, sum, x, o) -> put_products!(product, g, sum, x, o, b), gradients, sums, p.args, offsets(K, arguments(p, b)))
        all(regular | !wanted) && continue
        for (l, j) in enumerate(samples(b))
            lane(wanted, l) && !lane(regular, l) || continue
            note_singular!(() -> @late(add_vjp_of_sample!(gradients, one, p, inverses, v, j)), singular)
        end
    end
    throw_singular(singular)
    map(add_lanes!, gradients, sums)
    return
end

@inline put_products!(product, g, sum, x::PerSample{0}, o::Int, b) = store!(g, product(o + 1), b)
@inline put_products!(product, g, sum, x::PerSample{M}, o::Int, b) where {M} =
    (ntuple(i -> store!(g, product(o + i), b, i, M), Val(M)); nothing)
@inline function put_products!(product, g, sum, x::Shared, o::Int, b::Block)
    for i in eachindex(sum)
        @inbounds sum[i] += product(o + i) * counted(b)
    end
    return
end

function add_lanes!(g, sums)
    for i in eachindex(sums), l in 1:LANES
        g[i] += lane(sums[i], l)
    end
    return
end

"1 for the samples of a block, 0 for lanes that repeat the last."
@inline counted(b::Block) = is_full(b) ? one(Vec) : from_lanes(l -> Float64(b.first + l - 1 <= b.last))

function fill_block!(g, b::Block)
    m = length(g) ÷ size(g)[end]
    for j in samples(b), i in 1:m
        g[(j - 1) * m + i] = 0
    end
    return
end

# --- Jacobians -------------------------------------------------------------------------------------------------

function jacobian_side_by_side!(J::Array{T, 3}, p::Equation{T, K}, inverses, index::Val, wanted) where {T, K}
    total, threads, missed = size(J, 3), Threads.nthreads(), MISSED_GUARDS[]
    buffers = [(LaneBuffers(K), InverseBuffers{T}(K), zeros(T, K, size(J, 2))) for _ in 1:threads]
    find_pieces(cld(total, PIECE), threads) do thread, k
        jacobian_piece!(J, buffers[thread]..., p, inverses, index, wanted, piece(k, PIECE, total), is_root(p))
    end
    missed == MISSED_GUARDS[] || all(j -> !wanted[j] || all(isfinite, view(J, :, :, j)), 1:total) ||
        @late jacobian_one_by_one!(J, p, inverses, index, wanted)
    return J
end

function jacobian_piece!(J, w::LaneBuffers, one::InverseBuffers, B, p::Equation{T, K}, inverses, index::Val{I}, wanted, range, root) where {T, K, I}
    singular = Int[]
    for sample in first(range):LANES:last(range)
        check_interrupt()
        b = Block(sample, last(range))
        asked = mask_from_lanes(l -> wanted[min(sample + l - 1, last(range))])
        y, regular = linearize!(w, p, inverses, b, asked, root)
        offset = offsets(K, arguments(p, b))[I]
        for k in axes(J, 2)
            columns = ntuple(i -> partial_of(y[i], offset + k), Val(K))
            for i in 1:K
                entry = -sum(ntuple(m -> @inbounds(w.B[i, m]) * columns[m], Val(K)))
                store!(J, ifelse(regular, entry, Vec(NaN)), b, (k - 1) * K + i, K * size(J, 2))
            end
        end
        all(regular | !asked) && continue
        for (l, j) in enumerate(samples(b))
            lane(asked, l) && !lane(regular, l) || continue
            note_singular!(() -> @late(jacobian_of_sample!(J, one, B, p, inverses, index, j)), singular)
        end
    end
    throw_singular(singular)
    return
end
