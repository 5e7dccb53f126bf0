# Work shared among threads. Results never depend on the number of threads: work is divided into pieces by its size
# alone, and sums are taken over the pieces in their order.

"""
    in_parallel(work, pieces, threads)

Call `work(thread, piece)` for all pieces, each as soon as one of `threads` threads is free for it; no two calls with the same
`thread` (from 1) overlap. The first exception is thrown again. Where the other threads already help with something else, the
caller works alone.
"""
function in_parallel(work::F, pieces::Int, threads::Int) where {F}
    helpers = min(threads, pieces) - 1
    if helpers < 1 || Threads.atomic_xchg!(CREW_BUSY, true)
        foreach(piece -> work(1, piece), 1:pieces)
    else
        with_helpers(work, pieces, helpers)
    end
    return
end

# Compiled once for all work.
function with_helpers(@nospecialize(work), pieces::Int, helpers::Int)
    try
        job = Job(work, pieces, helpers)
        foreach(k -> hand_out!(helper!(k), job), 1:helpers)
        take_pieces!(job, 1)
        foreach(k -> call_off!(helper!(k), job), 1:helpers)
        wait_for(job)
        error = @atomic job.error
        error === nothing || throw(error)
    finally
        CREW_BUSY[] = false
    end
    return
end

# --- the other threads ------------------------------------------------------------------------------------------

# A sleeping thread takes as long to wake up as a tile to compute. So threads that have worked look out for the next job for a
# while (`WATCHFUL`), and nobody waits for one that is only waking up.

"The shared work of several threads: `work(thread, piece)` for all pieces."
mutable struct Job
    const work::Any
    const pieces::Int
    const over::Base.Event
    @atomic taken::Int             # pieces
    @atomic helpers::Int           # that have not finished
    @atomic error::Any             # the first, or nothing
end
Job(work, pieces::Int, helpers::Int) = Job(work, pieces, Base.Event(), 0, helpers, nothing)

# After an exception nobody takes any more pieces.
function take_pieces!(job::Job, thread::Int)
    try
        while (piece = @atomic job.taken += 1) <= job.pieces
            Base.invokelatest(job.work, thread, piece)     # which may be younger than the task of a helper
        end
    catch error
        @atomic job.taken += job.pieces
        @atomicreplace job.error nothing => error
    end
    return
end

"Another thread; `job` is its work, or one of the three states."
mutable struct Helper
    const thread::Int
    @atomic job::Union{Job, Symbol}
end

const CREW = Helper[]
const CREW_BUSY = Threads.Atomic{Bool}(false)

function helper!(k::Int)
    while length(CREW) < k
        push!(CREW, Helper(length(CREW) + 2, :absent))
    end
    return CREW[k]
end

function hand_out!(helper::Helper, job::Job)
    before = @atomicswap helper.job = job
    before === :absent && Threads.@spawn help($helper)
    return
end

"Take the job back from a helper that has not begun."
call_off!(helper::Helper, job::Job) = (@atomicreplace helper.job job => :waiting).success && leave!(job)

function help(helper::Helper)
    while (job = next_job(helper)) !== nothing
        take_pieces!(job, helper.thread)
        # A caller that was interrupted may have made room for another, whose job is there.
        @atomicreplace helper.job :working => :waiting
        leave!(job)
    end
    return
end

# The next job, or nothing if none came.
function next_job(helper::Helper)
    deadline = time_ns() + WATCHFUL
    while true
        job = @atomic helper.job
        if job isa Job
            (@atomicreplace helper.job job => :working).success && return job
        elseif time_ns() > deadline
            (@atomicreplace helper.job :waiting => :absent).success && return nothing
        else
            rest()
        end
    end
    return
end

function leave!(job::Job)
    (@atomic job.helpers -= 1) == 0 && notify(job.over)
    return
end

function wait_for(job::Job)
    deadline = time_ns() + WATCHFUL
    while @atomic(job.helpers) > 0
        time_ns() > deadline && return wait(job.over)
        rest()
    end
    return
end

"The original exception if tasks failed, else the exception itself."
cause(error) = error
cause(error::TaskFailedException) = cause(error.task.exception)
cause(error::CompositeException) = cause(first(error))

# A moment in a loop that waits: lets the other thread of the core work, and a garbage collection begin.
function rest()
    ccall(:jl_cpu_pause, Cvoid, ())
    GC.safepoint()
    return
end

"    piece(k, width, total)\n\nThe k-th of the ranges of `width` (the last may be shorter) that make up `1:total`."
piece(k::Int, width::Int, total::Int) = ((k - 1) * width + 1):min(k * width, total)

"    pieces_of(total, width)\n\nAll of these ranges."
pieces_of(total::Int, width::Int) = [piece(k, width, total) for k in 1:cld(total, width)]
