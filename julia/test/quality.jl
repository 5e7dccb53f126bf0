using Aqua

@testset "the package as a whole" begin
    Aqua.test_all(ImplicitRNN; persistent_tasks = false)
end
