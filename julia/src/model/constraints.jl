# Constraints on the recurrent weights: maps from the unconstrained parameters K of a recurrent stage to
# weights R that keep its equilibrium well defined, with their exact derivatives and the certificate that each
# provides. With L = diag(slope bounds), all conditions are on L R, so that any activation is covered.

"""
    Constraint

A map from the raw recurrent weights of a stage to the weights in force: [`Free`](@ref), [`Perron`](@ref),
[`InfNorm`](@ref), [`Spectral`](@ref) or [`Monotone`](@ref).
"""
abstract type Constraint end

fraction(name, x) = (check_fraction(name, x); Float64(x))

"""
    Free()

R = K: no constraint, as in Sanokowski (arXiv 2010.10564). Nothing is guaranteed about the equilibrium.
"""
struct Free <: Constraint end

"""
    Perron(kappa = 0.95)

R = e^{-A} K̂ e^{A} with A = diag(a) learnt and every row of L|K̂| summing to at most `kappa`, so the
Perron-Frobenius eigenvalue of L|R| is at most `kappa`: one equilibrium, to which Picard iteration
contracts in the norm max |e^{a_i} z_i| (El Ghaoui et al., SIAM J. Math. Data Sci. 3, 2021).
"""
struct Perron <: Constraint
    kappa::Float64
    Perron(kappa = 0.95) = new(fraction("kappa", kappa))
end

"""
    InfNorm(kappa = 0.95)

Every row of L|R| sums to at most `kappa`: a contraction in the maximum norm.
"""
struct InfNorm <: Constraint
    kappa::Float64
    InfNorm(kappa = 0.95) = new(fraction("kappa", kappa))
end

"""
    Spectral(rho = 0.95)

The largest singular value of L R is at most `rho`: a contraction in the Euclidean norm.
"""
struct Spectral <: Constraint
    rho::Float64
    Spectral(rho = 0.95) = new(fraction("rho", rho))
end

"""
    Monotone(margin = 0.05)

I - (L R + RᵀL)/2 ⪰ `margin`⋅I: one equilibrium (Winston and Kolter, NeurIPS 2020), although Picard iteration
need not converge to it.
"""
struct Monotone <: Constraint
    margin::Float64
    Monotone(margin = 0.05) = new(fraction("margin", margin))
end

const CONSTRAINTS = (; Free, Perron, InfNorm, Spectral, Monotone)

"Whether the constraint guarantees exactly one equilibrium for every input."
guarantees_uniqueness(::Constraint) = true
guarantees_uniqueness(::Free) = false

"Whether each evaluation of the equation reduces the error, as for a contraction, but not always for a monotone equation."
evaluation_contracts(::Constraint) = true
evaluation_contracts(::Monotone) = false

"Whether each neuron of a recurrent stage has a learnt scale: `a` of Perron; not for the others."
has_scales(::Constraint) = false
has_scales(::Perron) = true

# --- R = constrain(K) ---------------------------------------------------------------------------------------

"""
    constrain!(w, constraint, slopes)

Fill `w.recurrent` (n × n), the recurrent weights in force, from the raw weights `w.raw`, the learnt
`w.scales` (n, of Perron) and the bounds `slopes` (n) on |f′|.
"""
function constrain! end

"""
    constrain_pullback!(g, constraint, w, slopes)

Turn `g.recurrent` = ∂L/∂R into `g.raw` = ∂L/∂K and `g.scales` = ∂L/∂a, with `w` as filled in by
[`constrain!`](@ref).
"""
function constrain_pullback! end

constrain!(w, ::Free, slopes) = (copyto!(w.recurrent, w.raw); w)
constrain_pullback!(g, ::Free, w, slopes) = (copyto!(g.raw, g.recurrent); g)

# |x| and the sign of x. For a dual number of value 0 the sign is 0, and the derivative of |x|; ForwardDiff.jl takes that of one side.
@inline magnitude(x) = abs(x)
@inline sign_of(x) = sign(x)

# Rows: R_ij = c_i K_ij e^{a_j - a_i} with c_i = min(1, κ / (L_i Σ_j |K_ij|)).

constrain!(w, c::InfNorm, slopes) = scale_rows!(w, c.kappa, slopes, fill!(w.scaling, 1))
constrain!(w, c::Perron, slopes) = scale_rows!(w, c.kappa, slopes, exponentials!(w.scaling, w.scales))

# e^a up to a common factor, since only quotients matter; the factor keeps e^a of large a from overflowing.
function exponentials!(scaling, scales)
    low = high = first(scales)
    for a in scales
        low, high = min(low, a), max(high, a)
    end
    middle = low / 2 + high / 2
    @inbounds @vectors for i in eachindex(scaling, scales)
        scaling[i] = exp_bounded(scales[i] - middle)
    end
    return scaling
end

function scale_rows!(w, kappa, slopes, scaling)
    (; raw, recurrent, row_factor, row_sum) = w
    T = eltype(raw)
    fill!(row_sum, 0)
    for j in axes(raw, 2)
        @inbounds @simd for i in axes(raw, 1)
            row_sum[i] += magnitude(raw[i, j])
        end
    end
    for i in eachindex(row_sum)
        @inbounds row_factor[i] = min(one(T), T(kappa / slopes[i]) / row_sum[i])
    end
    for j in axes(raw, 2)
        @inbounds @simd for i in axes(raw, 1)
            recurrent[i, j] = row_factor[i] * raw[i, j] * (scaling[j] / scaling[i])
        end
    end
    return w
end

"""
∂L/∂K_ij = c_i (H_ij - [c_i < 1] sign(K_ij) Σ_k H_ik K_ik / Σ_k |K_ik|) with H_ij = ∂L/∂R_ij e^{a_j - a_i}, and
∂L/∂a_k = Σ_i ∂L/∂R_ik R_ik - Σ_j ∂L/∂R_kj R_kj.
"""
function constrain_pullback!(g, c::Union{InfNorm, Perron}, w, slopes)
    (; raw, recurrent, scaling, row_factor, row_sum) = w
    T = eltype(raw)
    inner = fill!(g.row_sum, 0)                      # Σ_j ∂L/∂R_ij R_ij = c_i Σ_j H_ij K_ij
    scaled = c isa Perron
    for j in axes(raw, 2)
        @inbounds @simd for i in axes(raw, 1)
            inner[i] += g.recurrent[i, j] * recurrent[i, j]
        end
        scaled && @inbounds(g.scales[j] = column_of_products(g.recurrent, recurrent, j))
    end
    if scaled
        @inbounds @simd for i in eachindex(inner)
            g.scales[i] -= inner[i]
        end
    end
    for i in eachindex(inner)
        @inbounds inner[i] = row_factor[i] < 1 ? inner[i] / row_sum[i] : zero(T)
    end
    for j in axes(raw, 2)
        @inbounds @simd for i in axes(raw, 1)
            h = g.recurrent[i, j] * row_factor[i] * (scaling[j] / scaling[i])
            g.raw[i, j] = h - sign_of(raw[i, j]) * inner[i]
        end
    end
    return g
end

# Σᵢ A_ij B_ij; of a few in their order, as nets side by side sum them.
function column_of_products(A::Matrix{T}, B::Matrix{T}, j::Int) where {T}
    total = zero(T)
    if size(A, 1) <= SMALL
        @inbounds for i in axes(A, 1)
            total += A[i, j] * B[i, j]
        end
    else
        @inbounds @simd for i in axes(A, 1)
            total += A[i, j] * B[i, j]
        end
    end
    return total
end

# The whole matrix: R = c K with c = min(1, limit / size(K)), where the size is a singular value or an eigenvalue.

constrain!(w, c::Union{Spectral, Monotone}, slopes) = @late scale_matrix!(w, c, slopes)
constrain_pullback!(g, c::Union{Spectral, Monotone}, w, slopes) = @late scale_matrix_pullback!(g, c, w, slopes)

function scale_matrix!(w, c, slopes)
    size, _ = matrix_size(c, w.raw, slopes)
    w.recurrent .= eltype(w.raw)(min(1, limit(c) / size)) .* w.raw
    return w
end

function scale_matrix_pullback!(g, c, w, slopes)
    size, direction = matrix_size(c, w.raw, slopes)
    if size <= limit(c)
        copyto!(g.raw, g.recurrent)
    else
        factor = limit(c) / size
        g.raw .= factor .* (g.recurrent .- (dot(g.recurrent, w.raw) / size) .* direction)
    end
    return g
end

limit(c::Spectral) = c.rho
limit(c::Monotone) = 1 - c.margin

# The size of K which the constraint limits (at least a tiny positive number), and its gradient ∂size/∂K. LAPACK refuses NaN and
# infinity; all is NaN then.
function matrix_size(::Spectral, K, slopes)
    M = slopes .* K
    all(isfinite, M) || return NaN, M .* NaN
    U, s, V = svd(M)
    return max(first(s), floatmin()), (slopes .* view(U, :, 1)) * view(V, :, 1)'
end
function matrix_size(::Monotone, K, slopes)
    M = slopes .* K
    M = (M .+ M') ./ 2
    all(isfinite, M) || return NaN, M .* NaN
    values, vectors = eigen(Symmetric(M))
    v = view(vectors, :, size(M, 1))
    return max(last(values), floatmin()), (slopes .* v) * v'
end

# --- certificates ---------------------------------------------------------------------------------------------

"""
    amplification(constraint, w, slopes)

A with `‖z - z*‖ <= A ‖f(u + R z) - z‖` for every z: the a posteriori error bound that a constraint provides, in the
norm max |e^{a_i} z_i| for the row constraints and in the Euclidean norm for the others; NaN for [`Free`](@ref).

With D = f′ and M = L R: a contraction has ‖(I - D R)⁻¹‖ <= 1/(1 - κ); for a monotone M,
(I - D R)⁻¹ = I + (I - D R)⁻¹ D R and ‖(I - D R)⁻¹ D L⁻¹‖₂ <= 1/m, hence 1 + ‖M‖₂/m.
"""
amplification(::Free, w, slopes) = NaN
amplification(c::Union{InfNorm, Perron}, w, slopes) = 1 / (1 - c.kappa)
amplification(c::Spectral, w, slopes) = 1 / (1 - c.rho)
amplification(c::Monotone, w, slopes) = all(isfinite, w.recurrent) ? 1 + opnorm(slopes .* w.recurrent) / c.margin : NaN
