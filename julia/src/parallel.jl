# Work shared among threads. What is computed never depends on how many there are: work is divided into pieces by its size
# alone, and sums are taken over the pieces in their order.

"""
    in_parallel(work, pieces, threads)

Call `work(thread, piece)` for all pieces, each as soon as one of `threads` tasks is free for it; no two calls with the same
`thread` (from 1) overlap. The first exception is thrown again.
"""
function in_parallel(work::F, pieces::Int, threads::Int) where {F}
    tasks = min(threads, pieces)
    if tasks <= 1
        for piece in 1:pieces
            work(1, piece)
        end
        return
    end
    next = Threads.Atomic{Int}(1)
    helpers = [Threads.@spawn(take_pieces(work, $thread, next, pieces)) for thread in 2:tasks]
    first_error = take_pieces(work, 1, next, pieces)
    for helper in helpers
        watch(helper)
        error = fetch(helper)
        first_error === nothing && (first_error = error)
    end
    first_error === nothing || throw(first_error)
    return
end

"Turns of a loop, some tenths of a millisecond, before a thread that waits goes to sleep."
const WATCHFUL = 10_000

# A sleeping thread takes as long to wake up as many a tile to compute.
function watch(task::Task)
    for _ in 1:WATCHFUL
        istaskdone(task) && return
        ccall(:jl_cpu_pause, Cvoid, ())
        GC.safepoint()
    end
    return
end

# Returns the exception that ended the work, after which the other threads take no further pieces either; or nothing.
function take_pieces(work::F, thread::Int, next, pieces::Int) where {F}
    try
        while (piece = Threads.atomic_add!(next, 1)) <= pieces
            work(thread, piece)
        end
        return nothing
    catch error
        Threads.atomic_add!(next, pieces)
        return error
    end
end

"    piece(k, width, total)\n\nThe k-th of the ranges of `width` (the last may be shorter) that make up `1:total`."
piece(k::Int, width::Int, total::Int) = ((k - 1) * width + 1):min(k * width, total)
