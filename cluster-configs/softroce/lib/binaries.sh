# shellcheck shell=bash
# belay's own programs, built on this machine and given to the hosts over the shared folder.

REPOSITORY=$(cd "$LAB/../.." && pwd)
readonly REPOSITORY

# Executables that cargo says it built, of a command's JSON messages on stdin.
built_executables() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | sort -u; }

cargo_here() { (cd "$REPOSITORY" && cargo "$@"); }

# Puts a program into the hosts' reach, without what only a debugger needs; its functions keep their names for profiles.
share_binary() { # path, name
  mkdir -p "$OUT/bin"
  strip --strip-debug -o "$OUT/bin/$2" "$1"
}

# Those tests of transport that suites run in a host; the others need no device.
readonly TRANSPORT_TESTS=(--lib --test conformance --test fabrics --test verbs --test verbs_registration)

# Makes what a suite needs: belay, bench, transport-tests, glue-tests, qemu. Once a run each.
need_binaries() {
  local what file
  for what in "$@"; do
    [ ! -e "$WORK/built.$what" ] || continue
    if [ "$what" = qemu ]; then share_qemu; : >"$WORK/built.$what"; continue; fi
    command -v cargo >/dev/null || die "cargo is not here, and this suite runs belay's own programs" "Install Rust, or run the suites that need none: lab --list."
    note "building $what"
    case $what in
      belay) cargo_here build --release --locked -p belay --bin belay --message-format=json >"$WORK/built" 2>"$WORK/cargo.log" || build_failed ;;
      bench) cargo_here build --release --locked -p belay-bench --message-format=json >"$WORK/built" 2>"$WORK/cargo.log" || build_failed ;;
      transport-tests) cargo_here test --release --locked -p belay-transport ${FEATURES:+--features "$FEATURES"} "${TRANSPORT_TESTS[@]}" --no-run --message-format=json >"$WORK/built" 2>"$WORK/cargo.log" || build_failed ;;
      glue-tests) cargo_here test --release --locked -p belay-vmm-glue --lib --no-run --message-format=json >"$WORK/built" 2>"$WORK/cargo.log" || build_failed ;;
    esac
    while read -r file; do share_binary "$file" "$(shared_name "$file")"; done < <(built_executables <"$WORK/built")
    : >"$WORK/built.$what"
  done
}

# A test executable's name carries a hash that says nothing to a person.
shared_name() {
  local name=${1##*/}
  printf '%s' "${name%-[0-9a-f][0-9a-f][0-9a-f][0-9a-f]*}"
}

build_failed() {
  tail -30 "$WORK/cargo.log" >&2
  die "belay does not build" "Mend it where \`cargo build --release\` shows it."
}
