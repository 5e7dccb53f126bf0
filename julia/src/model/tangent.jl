# The derivative of the weights in force along a direction of the parameters: through the constraints in dual numbers.

"""
    unpack_tangent(net, w, v)

The [`Weights`](@ref) whose entries are the derivatives of those in force, `w`, along the direction `v` of the parameters.
"""
function unpack_tangent(net::Network{T}, w::Weights{T}, v) where {T}
    tangent = unpack!(Weights(net), net, v)
    for (stage, ws, ts) in zip(net.stages, w.stages, tangent.stages)
        stage.recurrent || continue
        dual = dual_stage(stage, net, ws, ts)
        constrain!(dual, net.constraint, stage.slopes)
        map_each!(only ∘ partials, ts.recurrent, dual.recurrent)
    end
    return tangent
end

function dual_stage(stage, net, w::StageWeights{T}, t::StageWeights{T}) where {T}
    dual = StageWeights{Dual{Nothing, T, 1}}(stage, net.inputs)
    map_each!((x, dx) -> Dual{Nothing}(x, dx), dual.raw, w.raw, t.raw)
    map_each!((x, dx) -> Dual{Nothing}(x, dx), dual.scales, w.scales, t.scales)
    return dual
end

magnitude(x::Dual) = sign_of(x) * x
sign_of(x::Dual) = sign(ForwardDiff.value(x))

# --- derivatives of the size of a matrix, for dual numbers --------------------------------------------------------

nan_size(K::AbstractMatrix{<:Dual{G}}) where {G} = Dual{G}(NaN, NaN), K .* NaN

# First-order perturbation of the largest eigenvalue λ₁ and its eigenvector: v₁′ = Σₖ (vₖᵀM′v₁)/(λ₁ - λₖ) vₖ.
function matrix_size(c::Monotone, K::AbstractMatrix{<:Dual{G}}, slopes) where {G}
    M, dM = slopes .* ForwardDiff.value.(K), slopes .* only.(partials.(K))
    all(isfinite, M) && all(isfinite, dM) || return nan_size(K)
    values, vectors = eigen(Symmetric((M .+ M') ./ 2))
    n = length(values)
    v, S = vectors[:, n], (dM .+ dM') ./ 2
    dv = zero(v)
    for k in 1:(n - 1)
        dv .+= (dot(vectors[:, k], S, v) / (values[n] - values[k])) .* vectors[:, k]
    end
    dual_v = Dual{G}.(v, dv)
    return Dual{G}(max(values[n], floatmin()), dot(v, S, v)), (slopes .* dual_v) * dual_v'
end

# The same for singular values, from MᵀM and MMᵀ.
function matrix_size(c::Spectral, K::AbstractMatrix{<:Dual{G}}, slopes) where {G}
    M, dM = slopes .* ForwardDiff.value.(K), slopes .* only.(partials.(K))
    all(isfinite, M) && all(isfinite, dM) || return nan_size(K)
    U, s, V = svd(M)
    u, v = U[:, 1], V[:, 1]
    du, dv = zero(u), zero(v)
    for k in 2:length(s)
        a, b, gap = dot(U[:, k], dM, v), dot(u, dM, V[:, k]), s[1]^2 - s[k]^2
        du .+= ((s[1] * a + s[k] * b) / gap) .* U[:, k]
        dv .+= ((s[1] * b + s[k] * a) / gap) .* V[:, k]
    end
    return Dual{G}(max(s[1], floatmin()), dot(u, dM, v)),
        (slopes .* Dual{G}.(u, du)) * Dual{G}.(v, dv)'
end
