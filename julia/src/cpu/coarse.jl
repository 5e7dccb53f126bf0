# Coarse products: of lower precision than the network's, and much faster. They are good enough for the correction of an iterate, whose
# last digits do not matter; see `iterate_coarsely!`.

"""
    CoarseFactor

A square matrix, the left factor of coarse products. There are [`fill_factor!`](@ref), [`accuracy_of`](@ref),
[`coarse_buffers`](@ref) and [`solve_corrections!`](@ref).
"""
abstract type CoarseFactor end

"""
    coarse_factor(T, n)

An n × n factor of coarse products for columns of `T`, or nothing where there are none on this machine that are faster.
"""
function coarse_factor(::Type{T}, n::Int) where {T}
    T <: Hardware && n >= COARSE_NEURONS || return nothing
    has_matrix_unit() && return BFloats{MatrixUnit}(n)
    has_dot_products() && return BFloats{DotProducts}(n)
    return T === Float64 && n >= SINGLE_NEURONS ? Singles(n) : nothing
end

"    accuracy_of(A)\n\nThe change of a correction below which another product is not worth its cost."
function accuracy_of end

"    check_period(A)\n\nThe number of steps of which one is checked in an iteration of products of A."
check_period(::CoarseFactor) = CHECK_PERIOD

"The buffers of coarse products besides their factors."
abstract type CoarseBuffers end

"""
    Corrections(A, n, width)

The linear equations δ = r + D A δ of up to `width` columns of n rows, in single precision: the `residuals` r, whose place the
corrections δ take, the `slopes` D, and the `changes` A δ. The arrays may be larger.
"""
struct Corrections
    residuals::Matrix{Float32}
    slopes::Matrix{Float32}
    changes::Matrix{Float32}
    buffers::CoarseBuffers
end
function Corrections(A::CoarseFactor, n::Int, width::Int)
    buffers = coarse_buffers(A, n, width)
    return Corrections((zeros(Float32, size_of_columns(buffers)) for _ in 1:3)..., buffers)
end

"    coarse_buffers(A, n, width)\n\nThose of [`Corrections`](@ref), whose arrays have the size `size_of_columns(buffers)`."
function coarse_buffers end

"""
    solve_corrections!(q, A, q.buffers, m, accuracy, threads)

Iterate δ ← r + D A δ from δ = r in the first m columns until δ changes by less than `accuracy`, in the mean of some columns, whose
residuals have norm 1. For an `accuracy` of `Inf` the first δ is the last, and the changes are A r.
"""
function solve_corrections! end

"A step of that iteration: without a look at the change, with, and the last one, which is written out."
const NEXT, CHECKED, LAST = Val(:next), Val(:checked), Val(:last)

"The largest number of steps."
const MOST_SWEEPS = 128

# The last step when the sum of the squares of the changes is as small as this; one step of `period` is checked.
function sweep_to(sweep!::S, changes2::Float32, period::Int) where {S}
    number = 0
    while isfinite(changes2) && number < MOST_SWEEPS
        for _ in 2:period
            sweep!(NEXT, number += 1)
        end
        sweep!(CHECKED, number += 1) <= changes2 && break
    end
    sweep!(LAST, number + 1)
    return
end

# --- single precision for double ------------------------------------------------------------------------------------

"An n × n matrix in single precision, for columns in double precision."
struct Singles <: CoarseFactor
    panels::Panels{Float32}
end
Singles(n::Int) = Singles(Panels{Float32}(n, n))

accuracy_of(::Singles) = 2.0f0^-8

fill_factor!(value::F, A::Singles, threads::Int) where {F} = (fill_factor!(value, A.panels, threads); A)

struct SingleBuffers <: CoarseBuffers
    iterate::Matrix{Float32}
    zeros::Vector{Float32}
end
coarse_buffers(::Singles, n::Int, width::Int) = SingleBuffers(zeros(Float32, n, width), zeros(Float32, n))
size_of_columns(b::SingleBuffers) = size(b.iterate)

function solve_corrections!(q::Corrections, A::Singles, b::SingleBuffers, m::Int, accuracy::Float32, threads::Int)
    copyto!(b.iterate, 1, q.residuals, 1, size(b.iterate, 1) * m)
    sweep_to((step, _) -> sweep!(step, q, A, b, m, threads), accuracy^2 * m, check_period(A))
    return q
end

function sweep!(step::Val, q::Corrections, A::Singles, (; iterate, zeros)::SingleBuffers, m::Int, threads::Int)
    (; residuals, slopes, changes) = q
    multiply!(changes, zeros, A.panels, iterate, m, threads)
    to, change = step === LAST ? residuals : iterate, 0.0f0
    for j in 1:m
        @inbounds @vectors for i in axes(residuals, 1)
            next = muladd(slopes[i, j], changes[i, j], residuals[i, j])
            change = muladd(next - iterate[i, j], next - iterate[i, j], change)
            to[i, j] = next
        end
    end
    return change
end
