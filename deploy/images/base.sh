#!/bin/sh
# Make localhost/python:3.11-slim-bookworm out of Debian's packages, where no registry can be reached. Needs root,
# mmdebstrap and buildah. Like Debian's own slim images it has no manuals, no locales and no perl but perl-base.
set -eu
name=${1:-localhost/python:3.11-slim-bookworm}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates,usr-is-merged \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    bookworm "$root/base"
ln -s python3 "$root/base/usr/bin/python"
container=$(buildah from scratch)
buildah add --quiet "$container" "$root/base" /
buildah commit --quiet --rm "$container" "$name"
