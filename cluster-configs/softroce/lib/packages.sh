# shellcheck shell=bash
# The hosts' packages: named in packages.lock by name, version and SHA256, fetched into the lab's cache, unpacked and never installed.
#
# A line of the lock: set, package, version, sha256, origin. The set is `both` or a kernel's number, with `qemu:` before it for what only
# hosts that run a QEMU of their own get (lib/qemu.sh). The origin is a Debian suite, or for a kernel `SUITE:META`, where META is the
# package that always depends on the newest image (an image's name has its version).

readonly LOCK=$LAB/packages.lock
readonly DEFAULT_MIRROR=http://deb.debian.org/debian
readonly DEFAULT_SECURITY_MIRROR=http://deb.debian.org/debian-security

cache_dir() { printf '%s' "${BELAY_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/belay-lab}"; }

# apt with lists, cache and sources of the lab's own, so that the machine's stay as they are and no root is needed.
lab_apt() { APT_CONFIG=$CACHE/apt/apt.conf "$@"; }

# The mirror this machine uses for a Debian release, so that a local one is honoured.
mirror_of() { # codename, default
  local uri
  uri=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    awk -v c="$1" '$1 == c {print $2; exit}') || true
  printf '%s' "${uri:-$2}"
}

# Writes that configuration and fetches the signed indexes, once a run at most and only if something must be downloaded.
prepare_apt() {
  [ -z "${APT_PREPARED-}" ] || return 0
  local a=$CACHE/apt key=/usr/share/keyrings/debian-archive-keyring.gpg debian security
  [ -r "$key" ] || die "the key ring that signs Debian's packages is not here ($key)" "Run: apt-get install debian-archive-keyring"
  debian=${BELAY_LAB_MIRROR:-$(mirror_of bookworm $DEFAULT_MIRROR)}
  security=${BELAY_LAB_SECURITY_MIRROR:-$(mirror_of bookworm-security $DEFAULT_SECURITY_MIRROR)}
  mkdir -p "$a"/{lists/partial,archives/partial,empty}
  cat >"$a/sources.list" <<END
deb [arch=amd64 signed-by=$key] ${debian%/} bookworm main
deb [arch=amd64 signed-by=$key] ${debian%/} bookworm-updates main
deb [arch=amd64 signed-by=$key] ${security%/} bookworm-security main
deb [arch=amd64 signed-by=$key] ${debian%/} bookworm-backports main
END
  cat >"$a/apt.conf" <<END
Dir::State "$a";
Dir::State::lists "$a/lists";
Dir::State::status "/dev/null";
Dir::Cache "$a";
Dir::Cache::archives "$a/archives";
Dir::Cache::pkgcache "$a/pkgcache.bin";
Dir::Cache::srcpkgcache "$a/srcpkgcache.bin";
Dir::Etc::sourcelist "$a/sources.list";
Dir::Etc::sourceparts "$a/empty";
Dir::Etc::preferencesparts "$a/empty";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
END
  note "reading the package indexes"
  lab_apt apt-get update -qq >"$a/update.log" 2>&1 || {
    tail -5 "$a/update.log" >&2
    die "the package indexes could not be read" "Is the mirror reachable? BELAY_LAB_MIRROR names another; all of it: $a/update.log"
  }
  APT_PREPARED=yes
}

# Lines of the lock for a kernel; with `qemu:`, those of the QEMU that goes with it.
locked() { # kernel, prefix of the sets
  awk -v k="$1" -v p="${2-}" '!/^#/ && NF == 5 && ($1 == p "both" || $1 == p k)' "$LOCK"
}

# The newest version in a suite. Backports must be asked for by name; everything else is the newest of bookworm and its updates.
newest_version() { # package, suite
  local suite=$2
  lab_apt apt-cache madison "$1" | awk -F' *[|] *' -v bp="$suite" '
    {gsub(/ /, "", $2)} (bp ~ /backports/) == ($3 ~ /backports/) {print $2}' | sort -V | tail -1
}

# What a line of the lock stands for today: package, version, sha256.
resolve() { # package, origin
  local package=$1 suite=${2%%:*} meta='' version
  case $2 in *:*) meta=${2#*:} ;; esac
  if [ -n "$meta" ]; then
    version=$(newest_version "$meta" "$suite")
    package=$(lab_apt apt-cache show "$meta=$version" | sed -n 's/^Depends: *\(linux-image-[^ ,]*\).*/\1/p' | head -1)
  fi
  version=$(newest_version "$package" "$suite")
  [ -n "$package" ] && [ -n "$version" ] || return 1
  printf '%s %s %s\n' "$package" "$version" "$(index_sha256 "$package" "$version")"
}

# The checksum in apt's index, whose signature apt has verified.
index_sha256() { lab_apt apt-cache show "$1=$2" | sed -n 's/^SHA256: //p' | head -1; }

# Brings one package into the cache and leaves its path in DEB. A version the mirror no longer has is replaced by the newer one.
fetch_package() { # package, version, sha256, origin
  local package=$1 version=$2 sum=$3 origin=$4 log=$CACHE/apt/download.log
  DEB=$CACHE/debs/${package}_${version//:/%3a}.deb
  if is_sum "$DEB" "$sum"; then return; fi
  prepare_apt
  if [ "$(index_sha256 "$package" "$version")" != "$sum" ]; then
    local now
    now=$(resolve "$package" "$origin") || die "no mirror has $package any more" "Refresh the lock: lab --refresh-lock"
    warn "the mirror no longer has $package $version; taking ${now% *}, which apt's signed index vouches for. \`lab --refresh-lock\` makes that the lock's"
    read -r package version sum <<<"$now"
    DEB=$CACHE/debs/${package}_${version//:/%3a}.deb
    if is_sum "$DEB" "$sum"; then return; fi
  fi
  local into
  into=$(mktemp -d "$CACHE/debs/.new.XXXXXX")
  (cd "$into" && lab_apt apt-get download -qq "$package=$version") >"$log" 2>&1 || {
    cat "$log" >&2
    rm -rf "$into"
    die "$package $version could not be downloaded" "Try again, or name another mirror in BELAY_LAB_MIRROR."
  }
  local got=("$into"/*.deb)
  is_sum "${got[0]}" "$sum" || { rm -rf "$into"; die "$package $version is not what the lock says (SHA256)" "Do not use that mirror."; }
  mv "${got[0]}" "$DEB"
  rm -rf "$into"
}

is_sum() { [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d' ' -f1)" = "$2" ]; }

# Fetches and unpacks the packages of the lock's lines on stdin into a directory, checksums verified.
unpack_packages() { # into
  local set package version sum origin
  mkdir -p "$CACHE/debs" "$1"
  while read -r set package version sum origin; do
    fetch_package "$package" "$version" "$sum" "$origin" </dev/null
    dpkg-deb -x "$DEB" "$1"
  done
}

# Writes the lock again with what the suites have today.
refresh_lock() {
  local set package version sum origin new=$LOCK.new now
  mkdir -p "$CACHE/debs"
  prepare_apt
  sed '/^[^#]/,$d' "$LOCK" >"$new"
  while read -r set package version sum origin; do
    now=$(resolve "$package" "$origin") || die "no suite has $package any more" "Take its successor's name into packages.lock and try again."
    [ "$now" = "$package $version $sum" ] || note "$package $version -> ${now% *}"
    printf '%s %s %s\n' "$set" "$now" "$origin" >>"$new"
  done < <(grep -v '^#' "$LOCK")
  mv "$new" "$LOCK"
  note "$LOCK is as the suites are today; run \`lab smoke\` with each kernel before it is committed"
}
