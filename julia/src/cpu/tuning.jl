# Thresholds fitted to timings: the sizes above which one method is faster than another. They affect the time of a result and, where
# sums are taken in another order, its last bits. Fitted on two cores of x86 processors with AVX-512, and OpenBLAS;
# `python tests/benchmarks/run.py tune` measures those marked with `tune` on the current machine.

# --- products ---------------------------------------------------------------------------------------------------

"Products with matrices of up to this number of rows and columns are summed term by term, not by BLAS, which uses another order."
const SMALL = 12

"Where threads share a product, large matrices are divided into blocks of this number of rows or columns."
const BLOCK = 256

"Neurons and samples in a batch from which on coarse products are used; neurons where these are of single precision for double."
const COARSE_NEURONS, COARSE_SAMPLES, SINGLE_NEURONS = 25, 16, 128

"One step of so many is checked in an iteration of coarse products, and of those of the matrix unit, which cost less than a look at them."
const CHECK_PERIOD, UNIT_CHECK_PERIOD = 2, 4

# --- factorisations ---------------------------------------------------------------------------------------------

"Up to this many rows the LU factorisation is our own; LAPACK's above (`tune`)."
const SMALL_LU = 24

"Columns of a triangular solve that a thread takes at a time."
const RIGHT_HAND_SIDES = 32

"Stages of up to this number of neurons are solved side by side."
const LANE_NEURONS = 24

"""
    pays(saved, n, B)

Whether `saved` products of n × n matrices with a batch of B, and what goes with them, take longer than [`linearize!`](@ref). Both
sides are fitted to times of 32 to 256 neurons in both precisions, in units in which a product takes 1 for each operation (`tune`).
"""
pays(saved, n, B) = saved * B * n * (n + 50) > linearization_work(n)
linearization_work(n) = 1.5e6 + 2200.0 * n^2 + 1.4 * n^3

"The largest number of products that are usually saved, forward and adjoint together."
const MOST_SAVED = 10

# --- tiles and threads ------------------------------------------------------------------------------------------

"""
    tile_width(net, samples)

Samples in a tile: its matrices, some twenty of N × width, should stay in a core's L2 cache (1 MiB or so), and a batch should make a
few tiles of the same width for the threads to share if there is work for them. Where the recurrent weights take that cache
for themselves, more samples share each pass over them.
"""
function tile_width(net::Network{T}, samples::Int) where {T}
    N = neurons(net)
    least = N^2 * sizeof(T) > 2^19 ? 128 : 64
    widest = clamp(2^15 ÷ (N * sizeof(T)), least, 1024)
    narrowest = clamp(2^11 ÷ N, 32, 128)
    tiles = cld(samples, clamp(cld(samples, 4), narrowest, widest))
    return clamp(cld(cld(samples, max(tiles, 1)), 4) * 4, 1, max(samples, 1))
end

"Nanoseconds of work below which a second thread is not worth calling."
const WORTH_A_THREAD = 15_000

"Nanoseconds for a sample in a training gradient, fitted to times of 2 to 64 neurons (`tune`)."
work_per_sample(N) = N^2 ÷ 9 + 35N

threads_for(net::Network, samples::Int) =
    samples * work_per_sample(neurons(net)) < WORTH_A_THREAD ? 1 : Threads.nthreads()

"""
Nanoseconds for which a thread looks out for work, or for the end of it, before it goes to sleep. A sleeping one takes as long to wake
up as a tile to compute.
"""
const WATCHFUL = 500_000

"""
The sums over the batch are taken in so many shares at most, whatever the number of threads; fewer where the gradients, of which
each share has its own, would need much memory.
"""
const SHARES = 4:16

"Memory in bytes from which on there are fewer shares."
const SHARES_LIMIT = 2^26

# --- nets side by side --------------------------------------------------------------------------------------------

"""
A sample takes all nets of a group together about so many times as long as one net alone, which a step costs as much as so many samples
besides: of times of 2 to 12 neurons and 4 to 32 samples.
"""
const GROUP_SAMPLE, STEP_OVERHEAD = 10, 9

"The norm of fewer numbers is the root of the sum of squares; that of more is by BLAS."
const SMALL_NORM = 32

# --- equations ----------------------------------------------------------------------------------------------------

"From this many samples on, loops over them are compiled for the function."
const MANY = 4096

"Samples that a thread takes at a time."
const PIECE = 4096

"From this many entries of an argument on, derivatives are found in reverse mode."
const REVERSE_FROM = 128
