# Stopping a long computation from outside: a flag that loops look at once per iteration.

mutable struct Flag
    @atomic raised::Int32
end

"Not zero while the running computation is to stop. A host language may write to it from any thread."
const INTERRUPT = Flag(0)

"The address of the 32-bit integer in [`INTERRUPT`](@ref)."
interrupt_address() = UInt(pointer_from_objref(INTERRUPT))

"Thrown out of a computation that is stopped by [`INTERRUPT`](@ref)."
struct Interrupted <: Exception end
Base.showerror(io::IO, ::Interrupted) = print(io, "the computation was interrupted")

"    check_interrupt()\n\nThrow `Interrupted` if the computation is to stop. Call it only where no state is half written."
@inline check_interrupt() = (@atomic :monotonic INTERRUPT.raised) == 0 || throw(Interrupted())
