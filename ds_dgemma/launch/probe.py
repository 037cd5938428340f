"""What a node says of itself: this file's text is run there by the interpreter of the job, from the job's directory.

Only the standard library, so that a node which lacks the rest can say so. The answer is one line of JSON.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys


def digest(paths):
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(file.read())
    return total.hexdigest()


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_digest(name):
    found = importlib.util.find_spec(name)
    if not found or not found.submodule_search_locations:
        return None
    top = found.submodule_search_locations[0]
    files = (os.path.join(folder, file) for folder, _, names in os.walk(top) for file in names if file.endswith(".py"))
    return digest(sorted(files))


def file_digest(path):
    try:
        return digest([path])
    except OSError:
        return None


def port_is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def resolves(name):
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def gpus():
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return None


def answer(asked):
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: version(name) for name in asked["packages"]},
        "package": package_digest(asked["package"]),
        "files": {path: file_digest(path) for path in asked["files"]},
        "port_is_free": port_is_free(asked["port"]) if asked["port"] else True,
        "resolves": resolves(asked["address"]) if asked["address"] else True,
        "gpus": gpus(),
    }


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    print("PROBE " + json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
