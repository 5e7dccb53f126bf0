# Checks of a caller's arguments; `ArgumentError` and `DimensionMismatch` say what was given and what was expected.

# --- options ---------------------------------------------------------------------------------------------------

check_option(name, option, kind, examples) = option isa kind ||
    throw(ArgumentError("$name is $(repr(option)); expected one made by its constructor, such as $examples"))
check_number(name, x, holds, what, kind = Real) =
    x isa kind && !(x isa Bool) && holds(x) || throw(ArgumentError("$name must $what, got $(repr(x))"))
function check_count(name, x)
    check_number(name, x, >(0), "be a positive whole number", Integer)
    check_number(name, x, <=(typemax(Int)), "be at most $(typemax(Int))")
    return
end
check_truth(name, x) = x isa Bool || throw(ArgumentError("$name must be true or false, got $(repr(x))"))
check_fraction(name, x) = check_number(name, x, x -> 0 < x < 1, "lie strictly between 0 and 1")

"An `ArgumentError` if a workspace was made for a network other than that of a problem."
check_workspace(ws, net) = ws.net === net || ws.net == net || refuse_workspace(ws, net)
@noinline refuse_workspace(ws, net) =
    throw(ArgumentError("the workspace is that of $(ws.net), the problem has $net; make one by Workspace(net)"))

# --- arrays ----------------------------------------------------------------------------------------------------

"An `ArgumentError` where parameters, samples, other arrays (pairs of a name and a matrix), or states if given, are not arrays of real numbers."
function check_arrays(p, X, others...; start = nothing)
    check_host_array("the parameters", p, 1)
    check_host_array("the samples", X, 2)
    foreach(((what, A),) -> check_host_array("the $what", A, 2), others)
    start === nothing || check_host_array("the states", start, 2)
    return
end

function check_host_array(what, A, axes::Int)
    check_array(what, A, axes)
    backend_of(A) === nothing ||
        throw(ArgumentError("$what are on a device; give them as an Array, or compute there: `Workspace(net, backend)` says how"))
    return
end

function check_array(what, A, axes::Int, expected = EXPECTED[axes])
    check_shape(what, A, axes, expected)
    eltype(A) <: Dual && throw(
        ArgumentError(
            "$what have dual numbers of ForwardDiff.jl; take derivatives by `loss_and_gradient`, `vjp` or `jvp`, or differentiate \
            `Equilibrium(net)` and `read_out`"
        )
    )
    eltype(A) <: Real || all(x -> x isa Real, A) || throw(ArgumentError("$what have entries of type $(eltype(A)); expected real numbers"))
    return
end

const EXPECTED = ("a vector, as `initial_parameters` gives", "a matrix with a column for each sample; one sample is reshape(x, :, 1)")
function check_shape(what, A, axes::Int, expected = EXPECTED[axes])
    A isa AbstractArray && ndims(A) == axes || throw(ArgumentError("$what are $(described(A)); expected $expected"))
    return check_indices(what, A)
end

# Views and arrays of other packages may be written to, static arrays and ranges may not.
function check_writable(what, A)
    try
        A[begin] = A[begin]
    catch
        throw(ArgumentError("$what are a $(nameof(typeof(A))), which cannot be written to; give them as a Vector"))
    end
    return
end

# Loops in registers and on devices begin at 1, without bounds checks.
check_indices(what, A) = Base.has_offset_axes(A) && refuse_indices(what, A)
@noinline refuse_indices(what, A) =
    throw(ArgumentError("the indices of $what are $(join(axes(A), ", ")); expected an array whose indices begin at 1"))

function check_supervised(net, X, Y, weights)
    check_features(net, X)
    check_size("targets", Y, output_size(net), size(X, 2))
    weights === nothing && return
    check_array("the weights", weights, 1, "a vector with a number for each sample")
    length(weights) == size(X, 2) || throw(DimensionMismatch("there are $(length(weights)) weights for $(size(X, 2)) samples"))
    return
end

function check_pullback(net, dX, X, V, of, start)
    check_features(net, X)
    check_size("cotangents", V, rows_of(net, of), size(X, 2))
    check_size("derivatives", dX, net.inputs, size(X, 2))
    return check_start(net, X, start)
end

function check_pushforward(net, tangent, X, dp, dX, of, start)
    check_features(net, X)
    check_size("tangents", tangent, rows_of(net, of), size(X, 2))
    check_size("directions", dX, net.inputs, size(X, 2))
    check_length(net, dp, "direction")
    return check_start(net, X, start)
end

check_start(net, X, start) = start === nothing || check_size("states", start, neurons(net), size(X, 2))

function check_features(net, X)
    check_shape("the samples", X, 2)
    size(X, 1) == net.inputs || throw(DimensionMismatch("the network takes $(net.inputs) features, the samples have $(size(X, 1))"))
    return
end

function check_size(what, A, rows, samples)
    check_shape(what, A, 2)
    size(A) == (rows, samples) || throw(DimensionMismatch("$what are $(size(A)), but $rows rows for $samples samples were expected"))
    return
end

described(y::AbstractArray) = "an array of shape $(size(y))"
described(y::Tuple) = "a tuple of $(length(y))"
described(y::NamedTuple) = "a named tuple of $(join(keys(y), ", "))"
described(y) = "a $(typeof(y))"
