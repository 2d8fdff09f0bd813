# shellcheck shell=bash
# What must be on this machine before the lab can run. `lab --setup` is the only part of the lab that installs anything.

# command:package that brings it on Debian
readonly LAB_TOOLS='qemu-system-x86_64:qemu-system-x86 cpio:cpio modprobe:kmod depmod:kmod xz:xz-utils dpkg-deb:dpkg apt-get:apt flock:util-linux setpriv:util-linux strip:binutils'

# The packages of the tools that are not here.
missing_packages() {
  local pair
  for pair in $LAB_TOOLS; do
    have_tool "${pair%%:*}" || printf '%s\n' "${pair##*:}"
  done | sort -u
}

# modprobe and depmod live in /sbin, which an ordinary user's PATH may lack.
have_tool() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }

setup() {
  local missing
  mapfile -t missing < <(missing_packages)
  if [ "${#missing[@]}" -eq 0 ]; then
    note "nothing to install: everything the lab needs is here"
    return
  fi
  [ "$(id -u)" = 0 ] || die "installing ${missing[*]} needs root" "Run: sudo apt-get install ${missing[*]}"
  note "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends "${missing[@]}" >/dev/null
}

check_tools() {
  local missing
  mapfile -t missing < <(missing_packages)
  [ "${#missing[@]}" -eq 0 ] || die "this machine lacks ${missing[*]}" "Run: cluster-configs/softroce/lab --setup"
  PATH=$PATH:/usr/sbin:/sbin
}
