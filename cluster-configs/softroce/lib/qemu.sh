# shellcheck shell=bash
# A QEMU for the hosts themselves, and the Linux it runs there: an archive beside the image, which a suite that needs it has its hosts
# unpack. Images of the other suites do not grow by it, and a host that comes up again unpacks it again.
#
# The guest is that of belay's own tests (cli/tests/qemu_guest/guest.rs): a Linux whose only program keeps a working set that it checks, and
# counts on its serial port. Its kernel is the hosts' own.

readonly QEMU_GUEST_SOURCE=$REPOSITORY/cli/tests/qemu_guest/guest.rs
# What a machine without screen, disk and network card takes from QEMU's data: firmware, what loads a kernel, and KVM's option ROM.
readonly QEMU_FIRMWARE='usr/share/seabios/bios-256k.bin usr/share/qemu/linuxboot_dma.bin usr/share/qemu/kvmvapic.bin'
# Libraries that are this machine's, as in the image: the C library and the compiler's. Every other one is in the lock.
readonly MACHINE_LIBRARIES='libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2 libutil.so.1 libgcc_s.so.1'

qemu_key() { # kernel
  { locked "$1"; locked "$1" qemu:
    cat "$LAB"/lib/qemu.sh
    sha256sum </lib/x86_64-linux-gnu/libc.so.6
  } | sha256sum | cut -c1-16
}

# Makes sure of the archive for the run's kernel, builds the guest, and puts both where the hosts see them.
share_qemu() {
  local made
  made=$CACHE/qemu-$KERNEL-$(qemu_key "$KERNEL")
  if [ ! -e "$made/version" ]; then
    (
      flock -w 600 9 || die "another lab has been making an image for ten minutes" "If none is running, remove $CACHE/lock."
      [ -e "$made/version" ] || make_qemu "$KERNEL" "$made"
    ) 9>"$CACHE/lock"
  fi
  HOSTS_QEMU_VERSION=$(<"$made/version")
  mkdir -p "$OUT/bin/guest"
  cp "$made/qemu.tar" "$OUT/bin/qemu.tar"
  cp "$KERNEL_IMAGE" "$OUT/bin/guest/vmlinuz"
  make_guest "$OUT/bin/guest/initramfs"
}

# The same QEMU for this machine itself: program and firmware as they are packaged, which it finds beside itself. The libraries are this machine's
# own, those of its QEMU: they have the same names in both.
unpack_qemu() { # kernel, into
  local wanted program=$2/usr/bin/qemu-system-x86_64 missing
  CACHE=$(cache_dir)
  mkdir -p "$CACHE" || die "the cache $CACHE cannot be made" "BELAY_LAB_CACHE names another place."
  wanted=$(awk -v k="qemu:$1" '$1 == k' "$LOCK")
  if [ "$(cat "$2/packages" 2>/dev/null)" != "$wanted" ]; then
    note "fetching and unpacking QEMU ($(wc -l <<<"$wanted") packages)"
    (
      flock -w 600 9 || die "another lab has been making an image for ten minutes" "If none is running, remove $CACHE/lock."
      rm -rf "$2"
      unpack_packages "$2" <<<"$wanted"
    ) 9>"$CACHE/lock"
    printf '%s\n' "$wanted" >"$2/packages"
  fi
  missing=$(ldd "$program" | awk '/not found/ {print $1}')
  [ -z "$missing" ] || die "this machine lacks ${missing//$'\n'/ }, which $program needs" "Run: apt-get install qemu-system-x86"
  printf '%s\n' "$program"
}

make_qemu() { # kernel, into
  local tree file
  tree=$(mktemp -d "$CACHE/.tree.XXXXXX")
  # shellcheck disable=SC2064 # the directory is known now
  trap "rm -rf '$tree'" EXIT
  note "fetching and unpacking QEMU for the hosts ($(locked "$1" qemu: | wc -l) packages)"
  unpack_packages "$tree/pkg" < <(locked "$1" | grep -v ' linux-image-'; locked "$1" qemu:)
  mkdir -p "$tree/root/usr/bin" "$tree/root/lib/x86_64-linux-gnu"
  cp "$tree/pkg/usr/bin/qemu-system-x86_64" "$tree/root/usr/bin/"
  for file in $QEMU_FIRMWARE; do
    mkdir -p "$tree/root/${file%/*}"
    cp -L "$tree/pkg/$file" "$tree/root/$file" || die "the packages have no $file" "Has QEMU moved it? QEMU_FIRMWARE in lib/qemu.sh names it."
  done
  add_locked_libraries "$tree/pkg" "$tree/root"
  rm -rf "$2" "$2.new"
  mkdir -p "$2.new"
  tar -C "$tree/root" --owner=0 --group=0 -cf "$2.new/qemu.tar" .
  awk -v k="qemu:$1" '$1 == k && $2 == "qemu-system-x86" {print $3}' "$LOCK" >"$2.new/version"
  mv "$2.new" "$2"
  note "QEMU $(<"$2/version") ready for the hosts: $(($(stat -c %s "$2/qemu.tar") >> 20)) MiB"
}

# The libraries that QEMU is linked with. One that neither the lock nor the C library has would be whatever this machine happens to have.
add_locked_libraries() { # packages, root
  local library
  while read -r library; do
    case $library in
      "$1"/*) cp -L "$library" "$2/lib/x86_64-linux-gnu/" ;;
      */ld-linux*) ;;
      *) [[ " $MACHINE_LIBRARIES " == *" ${library##*/} "* ]] || die "QEMU needs ${library##*/}, which is not in the lock" "Add its package to packages.lock, in the set qemu:both." ;;
    esac
  done < <(qemu_libraries "$1")
}

qemu_libraries() { # packages
  LD_LIBRARY_PATH=$1/usr/lib/x86_64-linux-gnu:$1/lib/x86_64-linux-gnu ldd "$1/usr/bin/qemu-system-x86_64" |
    awk '/not found/ {print $1} $3 ~ /^\// {print $3} $1 ~ /^\// {print $1}'
}

# The guest's initramfs: its one program.
make_guest() { # file
  local root=$WORK/guest-root
  command -v rustc >/dev/null || die "rustc is not here, and this suite's guest is a Rust program" "Install Rust, or run the suites that need none: lab --list."
  mkdir -p "$root"
  rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols -o "$root/init" "$QEMU_GUEST_SOURCE" >"$WORK/rustc.log" 2>&1 ||
    { tail -20 "$WORK/rustc.log" >&2; die "the guest's program does not build" "Mend $QEMU_GUEST_SOURCE."; }
  (cd "$root" && printf 'init\0' | cpio -0 -o -H newc -R 0:0 --quiet) >"$1"
  rm -rf "$root"
}

# Has a host unpack QEMU and the guest, unless it has done so since it came up.
need_qemu() { # host
  LABEL=unpack on "$1" 120 '[ -e /opt/guest/ready ] || { tar -C / -xf /lab/bin/qemu.tar && cp -r /lab/bin/guest /opt/guest && qemu-system-x86_64 --version && : >/opt/guest/ready; }'
}
