# The default: Picard iteration as long as it is fast, then what is faster for the samples that are slow.

"Picard iterations between two looks at the rate."
const AUTO_BLOCK = 8

"""
    Auto(; tol = nothing, max_iterations = 1000)

Picard iteration first. Every $(AUTO_BLOCK) iterations, a sample whose contraction rate predicts more work than the alternative
is set aside; the samples set aside go on by Newton's method (stages of up to $(SMALL_LU) neurons) or Anderson acceleration and
then Newton's method (above), and the last ones by NLsolve's trust region. A sample's course depends on that sample only.
"""
struct Auto <: Solver
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Auto(; tol = nothing, max_iterations = 1000)
        check_options(tol, max_iterations)
        return new(tol, max_iterations)
    end
end

function iterate!(::Auto, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    n = size(c.F, 1)
    picard = Picard()
    # Newton costs about 4 iterations of n/3 + 2 products each, at a third of the speed of a product.
    # Without a guarantee Newton's method may find an equilibrium that repels; Picard iteration gets more time.
    patience = (n <= SMALL_LU ? 4 * (n ÷ 3 + 2) : 30) * (p.check_stability ? 8 : 1)
    used = 0
    while used < iterations && c.active > 0
        block = min(AUTO_BLOCK, iterations - used)
        iterate!(picard, c, p, block) && break
        used += block
        for j in c.active:-1:1
            predicted_iterations(c, p, j) > patience && set_aside!(c, j)
        end
    end
    reclaim!(c) == 0 && return true
    if n > SMALL_LU
        iterate!(Anderson(), c, p, 60) && return true
    end
    iterate!(Newton(), c, p, 50) && return true
    return iterate!(NLsolver(), c, p, 100)
end

# Iterations until the tolerance at the present rate.
function predicted_iterations(c::Columns{T}, p, j) where {T}
    goal = p.tol * max(norm(view(c.F, :, j)), p.floor)
    rate = min(c.rate[j], T(0.9999))
    return log(goal / c.residual[j]) / log(rate)
end

"Take column j out of the active ones, unfinished."
function set_aside!(c::Columns, j::Int)
    swap_columns!(c, j, c.active)
    push!(c.aside, c.active)
    c.active -= 1
    return
end

"Make the columns set aside the active ones; returns their number."
function reclaim!(c::Columns)
    for (j, k) in enumerate(sort!(append!(c.aside, 1:c.active)))
        j == k || move_column!(c, j, k)
    end
    c.active = length(c.aside)
    empty!(c.aside)
    return c.active
end

function swap_columns!(c::Columns, j::Int, k::Int)
    j == k && return
    for A in (c.U, c.Z, c.S, c.F)
        @inbounds @simd for i in axes(A, 1)
            A[i, j], A[i, k] = A[i, k], A[i, j]
        end
    end
    for v in (c.sample, c.iterations)
        v[j], v[k] = v[k], v[j]
    end
    for v in (c.residual, c.rate)
        v[j], v[k] = v[k], v[j]
    end
    return
end
