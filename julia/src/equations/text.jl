# Functions given as strings.

"The functions compiled from strings: code cannot be unloaded, so each string is compiled once."
const COMPILED = Dict{String, Function}()

"The modules of these functions. Nothing else keeps a nameless module, and with it the type of its functions, from being collected."
const PLACES = Module[]

"""
    compiled_function(text)

The anonymous function that a string defines, evaluated in a module of its own with `using LinearAlgebra`, and with
[`TotalFunctions`](@ref) unless it handles exceptions. Throws `InvalidCode`, which says what is wrong with the string.
"""
compiled_function(text::String) = get!(() -> compile_text(text), COMPILED, text)

"A string is not the code of a function; `text` says why."
struct InvalidCode <: Exception
    text::String
end
Base.showerror(io::IO, e::InvalidCode) = print(io, e.text)

function compile_text(text)
    code = Meta.parse(text; raise = false)
    if Meta.isexpr(code, (:error, :incomplete))
        throw(InvalidCode("the Julia code $(repr(text)) cannot be parsed: $(parse_message(only(code.args)))"))
    end
    if Meta.isexpr(code, :toplevel) && count(line -> !(line isa LineNumberNode), code.args) > 1
        throw(InvalidCode("the Julia code $(repr(text)) has more behind a semicolon: write function (z, a) … end, or z -> (…; …)"))
    end
    place = Module(gensym("equation"))
    push!(PLACES, place)
    Core.eval(place, :(const LinearAlgebra = $LinearAlgebra; using .LinearAlgebra))
    handles_exceptions(code) || foreach(name -> Core.eval(place, :(const $name = $(getfield(TotalFunctions, name)))), TotalFunctions.NAMES)
    f = Core.eval(place, code)
    f isa Function || throw(InvalidCode("the Julia code $(repr(text)) gives a $(typeof(f)), not a function"))
    return f
end

handles_exceptions(code) = code isa Expr && (code.head === :try || any(handles_exceptions, code.args))

# Julia draws an arrow with the message behind it, below the line in question.
parse_message(error::Exception) = parse_message(sprint(showerror, error))
function parse_message(said)
    lines = split(strip(string(said)), '\n')
    found = findlast(contains("──"), lines)
    return strip(found === nothing ? last(lines) : last(split(lines[found], "──")))
end
