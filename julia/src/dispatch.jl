# Options are fields of abstract types, so that all of their combinations share compiled code. A call with such an argument is
# dispatched at run time, with boxed arguments: for the smallest networks that takes longer than the work.

"""
    @usual x Type call

`call`, dispatched statically if the variable `x` has the usual type, or one of a union; else at run time.
"""
macro usual(x, types, call)
    types = Meta.isexpr(types, :curly) ? types.args[2:end] : [types]
    x, call = esc(x), esc(call)
    return foldr((type, otherwise) -> :($x isa $(esc(type)) ? $call : $otherwise), types; init = call)
end

"A function of unknown type, for code that is compiled once."
struct Opaque
    f::Any
end
(g::Opaque)(x...) = g.f(x...)

"""
    @late call

`call`, with its method found and compiled when it is first reached: for rare code that takes long to compile, and would otherwise be
compiled with every caller. Nor is a caller recompiled when another package invalidates a method that the call may use.
"""
macro late(call)
    Meta.isexpr(call, :call) || throw(ArgumentError("@late takes a call, got $call"))
    arguments = call.args[2:end]
    options = filter(a -> Meta.isexpr(a, :parameters), arguments)
    return esc(Expr(:call, :(Base.invokelatest), options..., call.args[1], filter(a -> !Meta.isexpr(a, :parameters), arguments)...))
end
