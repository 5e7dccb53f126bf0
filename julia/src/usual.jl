# Options are fields of abstract types, so that all of their combinations share compiled code. A call that is given one finds its
# method at run time, and what it is given is boxed: for the smallest networks that takes longer than the work.

"""
    @usual x Type call

`call`, with its method known in advance where the variable `x` has the usual type, or one of a union; else found at run time.
"""
macro usual(x, types, call)
    types = Meta.isexpr(types, :curly) ? types.args[2:end] : [types]
    x, call = esc(x), esc(call)
    return foldr((type, otherwise) -> :($x isa $(esc(type)) ? $call : $otherwise), types; init = call)
end
