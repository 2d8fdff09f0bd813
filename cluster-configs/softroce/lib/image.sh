# shellcheck shell=bash
# Kernel and initramfs of the hosts, made from the locked packages, the guest/ folder and this machine's C library. Cached under a
# hash of all that goes in, so that a warm lab makes nothing.

# Programs of the packages that the hosts get, by the folder they are packaged in.
readonly IMAGE_PROGRAMS='bin/ip sbin/tc bin/rdma sbin/rdma usr/bin/rdma bin/ss
  usr/bin/ibv_devinfo usr/bin/ibv_rc_pingpong usr/bin/rping usr/bin/ib_read_lat usr/bin/ib_read_bw usr/bin/ib_write_bw'
# The provider that libibverbs opens for rxe devices.
readonly IMAGE_PROVIDER=usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so
# Modules asked for; what they need comes with them. virtio's own parts and crc32_generic are needed and nobody's dependency.
readonly IMAGE_MODULES='virtio_ring virtio virtio_pci virtio_net virtio_blk virtio_balloon 9pnet_virtio 9p virtio_rng crc32_generic rdma_rxe rdma_ucm kvm_amd sch_netem tun ifb sch_plug sch_ingress act_mirred cls_matchall'

# What the image is made of, as one word. The C library is this machine's, because belay is built here.
image_key() { # kernel
  { locked "$1"
    cat "$LAB"/lib/image.sh "$LAB"/lib/packages.sh "$LAB"/guest/*
    sha256sum </lib/x86_64-linux-gnu/libc.so.6
  } | sha256sum | cut -c1-16
}

# Makes sure of the image for a kernel; leaves KERNEL_IMAGE, INITRAMFS and KERNEL_RELEASE behind.
prepare_image() { # kernel
  CACHE=$(cache_dir)
  mkdir -p "$CACHE" || die "the cache $CACHE cannot be made" "BELAY_LAB_CACHE names another place."
  local made
  made=$CACHE/image-$1-$(image_key "$1")
  if [ ! -e "$made/release" ]; then
    # Two labs may want the same image at once: one makes it and the other waits.
    (
      flock -w 600 9 || die "another lab has been making an image for ten minutes" "If none is running, remove $CACHE/lock."
      [ -e "$made/release" ] || make_image "$1" "$made"
    ) 9>"$CACHE/lock"
  fi
  KERNEL_IMAGE=$made/vmlinuz INITRAMFS=$made/initramfs KERNEL_RELEASE=$(<"$made/release")
}

make_image() { # kernel, into
  local tree root release
  tree=$(mktemp -d "$CACHE/.tree.XXXXXX")
  # shellcheck disable=SC2064 # the directory is known now
  trap "rm -rf '$tree'" EXIT
  note "fetching and unpacking $(locked "$1" | wc -l) packages for kernel $1"
  unpack_packages "$tree/pkg" < <(locked "$1")
  root=$tree/root
  release=$(ls "$tree/pkg/lib/modules")
  mkdir -p "$root"/{bin,sbin,etc/libibverbs.d,proc,sys,dev,tmp,run,lab,opt,modules,usr/bin,lib/x86_64-linux-gnu,lib64,var/lib,root}
  cp "$tree/pkg/bin/busybox" "$root/bin/"
  ln -s busybox "$root/bin/sh"
  cp "$tree/pkg/etc/libibverbs.d/rxe.driver" "$root/etc/libibverbs.d/"
  printf 'root:x:0:0:root:/root:/bin/sh\n' >"$root/etc/passwd"
  add_programs "$tree/pkg" "$root"
  add_modules "$tree/pkg" "$root" "$release"
  cp "$LAB"/guest/* "$root/sbin/"
  chmod +x "$root"/sbin/*
  ln -s sbin/init "$root/init"
  rm -rf "$2"
  mkdir -p "$2.new"
  (cd "$root" && find . -print0 | cpio -0 -o -H newc -R 0:0 --quiet) >"$2.new/initramfs"
  cp "$tree"/pkg/boot/vmlinuz-* "$2.new/vmlinuz"
  printf '%s\n' "$release" >"$2.new/release"
  mv "$2.new" "$2"
  # Images of other locks and scripts, and trees of a lab that was killed, are of no use after a week.
  find "$CACHE" -maxdepth 1 \( -name 'image-*' -o -name 'qemu-*' -o -name '.tree.*' \) -mtime +7 ! -path "$2" -exec rm -rf {} +
  note "image ready: kernel $release, initramfs of $(($(stat -c %s "$2/initramfs") >> 20)) MiB"
}

# Programs and the provider, each with the shared libraries it opens.
add_programs() { # packages, root
  local pkg=$1 root=$2 file
  local -x LD_LIBRARY_PATH=$pkg/usr/lib/x86_64-linux-gnu:$pkg/lib/x86_64-linux-gnu
  for file in $IMAGE_PROGRAMS; do
    [ -f "$pkg/$file" ] || continue
    cp -L "$pkg/$file" "$root/usr/bin/"
    add_libraries "$pkg/$file" "$root"
  done
  mkdir -p "$root/${IMAGE_PROVIDER%/*}"
  cp "$pkg/$IMAGE_PROVIDER" "$root/$IMAGE_PROVIDER"
  add_libraries "$pkg/$IMAGE_PROVIDER" "$root"
  # What belay opens at run time, and what every Rust program and pthread_cancel need.
  for file in libibverbs.so.1 librdmacm.so.1; do
    cp -L "$pkg/usr/lib/x86_64-linux-gnu/$file" "$root/lib/x86_64-linux-gnu/"
    add_libraries "$pkg/usr/lib/x86_64-linux-gnu/$file" "$root"
  done
  for file in libgcc_s.so.1 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1; do
    cp -L "/lib/x86_64-linux-gnu/$file" "$root/lib/x86_64-linux-gnu/"
  done
}

add_libraries() { # file, root
  local library
  while read -r library; do
    case $library in
      */ld-linux*) cp -Ln "$library" "$2/lib64/" ;;
      *) cp -Ln "$library" "$2/lib/x86_64-linux-gnu/" ;;
    esac
  done < <(ldd "$1" 2>/dev/null | grep -oE '/[^ ]+\.so[^ ]*')
}

# Modules in the order they must be loaded, decompressed here because it is faster than in the host.
add_modules() { # packages, root, release
  local module file name
  [ -e "$1/lib/modules/$3/modules.dep" ] || depmod -b "$1" "$3"
  for module in $IMAGE_MODULES; do
    while read -r file; do
      name=${file##*/} name=${name%.xz}
      [ ! -e "$2/modules/$name" ] || continue
      case $file in
        *.xz) xz -dc "$file" >"$2/modules/$name" ;;
        *) cp "$file" "$2/modules/$name" ;;
      esac
      printf '%s\n' "$name" >>"$2/modules/order"
    done < <(modprobe -d "$1" -S "$3" --show-depends "$module" 2>/dev/null | awk '$1 == "insmod" {print $2}')
  done
  [ -e "$2/modules/rdma_rxe.ko" ] || die "kernel $3 has no rdma_rxe module" "Refresh the lock, or choose another --kernel."
}
