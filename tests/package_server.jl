# What a Julia package server has to know to serve one version of each package: the registry, and where the packages lie.
#
#     julia package_server.jl TARGET MANIFEST FOLDER...
#
# The packages are those that the manifest has by their path, those in the folders, and those of the standard library that Pkg
# takes from a registry. In TARGET are then the registry, and index.toml with the folder of each path that a client asks for.

import Pkg, TOML
using Base: UUID
using Pkg.GitTools: tree_hash
using Pkg.Types: is_stdlib
using Pkg.Versions: semver_spec

const GENERAL = "23338594-aafe-5451-b93e-139f81909106"  # the registry that Pkg asks for where it has none
const FROM_REGISTRY = ("DelimitedFiles", "Statistics")
const NOWHERE = "https://127.0.0.1:9"

struct Package
    name::String
    uuid::String
    version::String
    folder::String
    project::Dict{String, Any}
end

function Package(folder)
    names = filter(name -> isfile(joinpath(folder, name)), ["JuliaProject.toml", "Project.toml"])
    project = TOML.parsefile(joinpath(folder, first(names)))
    return Package(project["name"], project["uuid"], project["version"], folder, project)
end

paths(manifest) =
    [normpath(dirname(manifest), e["path"]) for entries in values(TOML.parsefile(manifest)["deps"]) for e in entries if haskey(e, "path")]

hash_of(folder) = bytes2hex(tree_hash(folder))
ranges(spec) = string.(semver_spec(spec isa String ? spec : join(spec, ", ")).ranges)

write_toml(file, table) = (mkpath(dirname(file)); open(io -> TOML.print(io, table; sorted = true), file, "w"))

# The tables of a registry for one package, each by version.
function tables(versions)
    content = Dict(name => Dict{String, Any}() for name in ("Versions", "Deps", "Compat", "WeakDeps", "WeakCompat"))
    for p in versions
        deps, weak, compat = (get(p.project, key, Dict()) for key in ("deps", "weakdeps", "compat"))
        strong = filter(d -> !haskey(weak, first(d)), deps)
        limits(known) = Dict(name => ranges(spec) for (name, spec) in compat if haskey(known, name))
        content["Versions"][p.version] = Dict("git-tree-sha1" => hash_of(p.folder))
        content["Deps"][p.version], content["WeakDeps"][p.version] = strong, weak
        content["Compat"][p.version] = limits(merge(strong, Dict("julia" => "")))
        content["WeakCompat"][p.version] = limits(weak)
    end
    return content
end

function main(target, manifest, folders...)
    bundled = filter(isdir, [joinpath(Sys.STDLIB, name) for name in FROM_REGISTRY])
    packages = map(Package, [paths(manifest); bundled; folders...])
    # All that others name, be it only for an extension. A stand-in goes by the UUID that those who need it know.
    named = merge((get(p.project, key, Dict()) for p in packages for key in ("deps", "weakdeps"))...)
    uuids = filter(d -> !is_stdlib(UUID(last(d))), merge(Dict(p.name => p.uuid for p in packages), named))
    registry, index = joinpath(target, "registry"), Dict{String, String}()
    for (name, uuid) in uuids
        versions = filter(p -> p.name == name, packages)
        write_toml(joinpath(registry, name, "Package.toml"), Dict("name" => name, "uuid" => uuid, "repo" => "$NOWHERE/$name.jl.git"))
        for (table, content) in tables(versions)
            write_toml(joinpath(registry, name, "$table.toml"), content)
        end
        merge!(index, Dict("/package/$uuid/$(hash_of(p.folder))" => p.folder for p in versions))
    end
    entries = Dict(uuid => Dict("name" => name, "path" => name) for (name, uuid) in uuids)
    write_toml(
        joinpath(registry, "Registry.toml"),
        Dict("name" => "General", "uuid" => GENERAL, "repo" => "$NOWHERE/General.git", "packages" => entries),
    )
    index["/registry/$GENERAL/$(hash_of(registry))"] = registry
    write_toml(joinpath(target, "index.toml"), index)
    return nothing
end

main(ARGS...)
