# shellcheck shell=bash
# Hosts that are left up: how they are reached and ended. All that is known of them is in their folder under the temporary one.

# Prints how to reach and end the hosts, and lets go of them.
keep_hosts() {
  local host
  need_hosts
  KEPT=yes
  for host in $HOSTS; do
    sed -n 's/^char device redirected to \(.*\) (label console)$/\1/p' "$OUT/$host/qemu.log" | tail -1 >"$WORK/$host.console"
    tell "$host" console
  done
  cat >&2 <<END

Both hosts are up. Host a is $A_DATA, host b is $B_DATA (rxe0 on eth0, GID index 1); $OUT is /lab in both.
  $LAB/lab --console $WORK/a       a shell on host a (ctrl-] leaves it)
  $LAB/lab --console $WORK/b       a shell on host b
  $LAB/lab --end $WORK             end both
END
}

# A terminal on a kept host's shell, until ctrl-].
open_console() { # DIR/HOST
  local pty saved reader
  [ ! -r "$1.console" ] || pty=$(<"$1.console")
  [ -c "${pty-}" ] || die "no host is kept at $1" "\`lab --keep\` prints the words to use."
  [ -t 0 ] || die "a console needs a terminal" "Run this from one."
  saved=$(stty -g)
  # shellcheck disable=SC2064 # as it is now
  trap "stty '$saved'" EXIT
  stty raw -echo <"$pty"
  printf '(ctrl-] leaves)\n'
  cat "$pty" &
  reader=$!
  # Here, ctrl-] is the only key this terminal takes for itself: it ends the copy below.
  stty raw -echo isig intr ^] quit undef susp undef
  trap 'kill "$reader" 2>/dev/null' INT
  printf '\n' >"$pty"
  cat >"$pty" || true
  kill "$reader" 2>/dev/null || true
}

end_kept() { # DIR
  local host pid out
  case ${1##*/} in belay-lab.*) ;; *) die "$1 is not a folder of kept hosts" "\`lab --keep\` prints the words to use." ;; esac
  [ -d "$1" ] || die "no hosts are kept at $1: they may have been ended"
  for host in $HOSTS; do
    [ -r "$1/$host.pid" ] || continue
    pid=$(<"$1/$host.pid")
    # A number may have gone to another process since: only a QEMU of this folder is ended.
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$1/$host.agent"; then kill -KILL "$pid"; fi
  done
  if [ -r "$1/out" ]; then
    out=$(<"$1/out")
    rm -rf "${out:?}/bin"
  fi
  rm -rf "$1"
  note "ended"
}
