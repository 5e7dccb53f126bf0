# Coarse products: of fewer digits than the precision that is asked for, and much faster. They do where what is multiplied is a
# correction, whose last digits do not matter; see `iterate_linearized!`.

"""
    CoarseFactor{T}

A square matrix, the left factor of coarse products with columns of `T`. There are `size(A, 1)`, [`rounding_of`](@ref),
[`fill_coarse!`](@ref), [`coarse_buffers`](@ref) and [`multiply_add_coarsely!`](@ref).
"""
abstract type CoarseFactor{T} end

"""
    coarse_factor(T, n)

An n × n factor of coarse products with columns of `T`, or nothing where there are none on this machine that are faster.
"""
function coarse_factor(::Type{T}, n::Int) where {T}
    T <: Hardware && n >= COARSE_NEURONS || return nothing
    return has_matrix_unit() ? BFloats{T}(n) : T === Float64 ? Singles(n) : nothing
end

"    rounding_of(A)\n\nThe size of a correction, relative to what is corrected, up to which coarse products find it."
function rounding_of end

"    fill_coarse!(value, A, threads)\n\n`A[i, k] = value(i, k)`"
function fill_coarse! end

"What coarse products need."
abstract type CoarseBuffers end

"    coarse_buffers(A, width)\n\nThose of products with up to `width` columns, on all threads."
function coarse_buffers end

"    multiply_add_coarsely!(S, A, B, m, threads, buffers)\n\n`S[:, 1:m] += A B[:, 1:m]`"
function multiply_add_coarsely! end

store_coarse!(A::CoarseFactor, M::Matrix, threads::Int) = fill_coarse!((i, k) -> @inbounds(M[i, k]), A, threads)
store_coarse_transposed!(A::CoarseFactor, M::Matrix, threads::Int) = fill_coarse!((i, k) -> @inbounds(M[k, i]), A, threads)

# --- single precision for double ------------------------------------------------------------------------------------

"An n × n matrix in single precision, for columns in double precision."
struct Singles <: CoarseFactor{Float64}
    panels::Panels{Float32}
end
Singles(n::Int) = Singles(Panels{Float32}(n, n))

Base.size(A::Singles, d::Int) = size(A.panels, d)
rounding_of(::Singles) = 2.0^-21

fill_coarse!(value::F, A::Singles, threads::Int) where {F} = (fill_panels!(value, A.panels, threads); A)

"Columns in single precision, and their products."
struct SingleBuffers <: CoarseBuffers
    columns::Matrix{Float32}
    products::Matrix{Float32}
    zeros::Vector{Float32}
end
coarse_buffers(A::Singles, width::Int) =
    SingleBuffers(zeros(Float32, size(A, 1), width), zeros(Float32, size(A, 1), width), zeros(Float32, size(A, 1)))

function multiply_add_coarsely!(S::Matrix{Float64}, A::Singles, B::Matrix{Float64}, m::Int, threads::Int, buffers::SingleBuffers)
    (; columns, products) = buffers
    count = size(A, 1) * m
    @inbounds @simd ivdep for i in 1:count
        columns[i] = B[i]
    end
    multiply!(products, buffers.zeros, A.panels, columns, m, threads)
    @inbounds @simd ivdep for i in 1:count
        S[i] += products[i]
    end
    return S
end
