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

function iterate!(::Auto, c::Columns{T}, p::Stationary{T}, ::Int) where {T}
    n = size(c.F, 1)
    n <= LANE_NEURONS && solve_lanes!(lanes_of(c), c, p) && return true
    c.cold = false
    # Newton costs about 4 iterations of n/3 + 2 products each, at a third of the speed of a product.
    # Without a guarantee Newton's method may find an equilibrium that repels; Picard iteration gets more time.
    patience = (n <= SMALL_LU ? 4 * (n ÷ 3 + 2) : 30) * (p.unique ? 1 : 8)
    begun = p.recurrence.linearized
    begun && linearized_first!(c, p) && return true
    while c.active > 0
        for _ in 1:AUTO_BLOCK
            evaluate_all!(c, p; check = !begun, rescue = true) && break
            begun = true
            advance!(c, one(T))
        end
        for j in c.active:-1:1
            predicted_iterations(c, p, j) > patience && defer!(c, j)
        end
    end
    reclaim!(c) == 0 && return true
    n > SMALL_LU && iterate!(Anderson(), c, p, 60) && return true
    iterate!(Newton(), c, p, 50) && return true
    return iterate!(NLsolver(), c, p, 100)
end

"""
Where an equilibrium may be one of several, the linearised equation may lead to another than Picard iteration from the start
does. It is then used only once that iteration is seen to contract.
"""
function linearized_first!(c::Columns{T}, p::Stationary{T}) where {T}
    steps = p.unique ? 1 : 3
    for k in 1:steps
        evaluate_all!(c, p; check = k == 1, rescue = true) && return reclaim!(c) == 0
        k < steps && advance!(c, one(T))
    end
    if !p.unique
        for j in c.active:-1:1
            contracts(c.rate[j]) || defer!(c, j)
        end
    end
    done = iterate_linearized!(c, p, LINEARIZED_PATIENCE)
    done || advance!(c, one(T))
    return reclaim!(c) == 0
end

predicted_iterations(c::Columns, p, j) =
    predicted_iterations(p.tol * max(norm(view(c.F, :, j)), p.floor), c.residual[j], c.rate[j])

"Iterations until a residual that shrinks at the present rate is as small as the goal."
predicted_iterations(goal::T, residual::T, rate::T) where {T <: AbstractFloat} = log(goal / residual) / log(min(rate, T(0.9999)))
