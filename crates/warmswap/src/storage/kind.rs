//! What a descriptor of a backend is, as far as its death is concerned.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

/// What a descriptor is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file or a block device: it holds data.
    Storage,
    /// Nothing done through it outlives the process.
    Harmless,
    /// What is done through it may outlive the process, where nobody here can see it; what it is.
    Foreign(String),
}

/// Character devices through which nothing is done that outlives a process: what they do is done when the call returns, or ends with
/// the last descriptor.
const HARMLESS_DEVICES: &[(u32, Option<u32>)] = &[
    // null, zero, full, random, urandom.
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    // tty, console, ptmx; serial terminals and pseudo terminals.
    (5, None),
    (4, None),
    (136, None),
    (137, None),
    (138, None),
    (139, None),
    (140, None),
    (141, None),
    (142, None),
    (143, None),
    // hwrng (copied by the call, what an entropy device reads), userfaultfd, tun (packets are copied by the call), kvm (a VM's
    // memory and processors, no storage).
    (10, Some(183)),
    (10, Some(126)),
    (10, Some(200)),
    (10, Some(232)),
];

/// Where servers listen that store nothing for a guest: a service's output, the system log, message buses, names of users.
const HARMLESS_SERVERS: &[&str] =
    &["/run/systemd/", "/dev/log", "/run/dbus/", "/var/run/dbus/", "/run/nscd/", "/var/run/nscd/"];

/// `AF_VSOCK`: another virtual machine, or the host.
const VSOCK: AddressFamily = AddressFamily::from_raw(40);

/// What a file with a path is. `fd` is its number in the backend.
pub(super) fn of_file(copy: &OwnedFd, fd: i32, path: &str) -> Kind {
    let Ok(stat) = rustix::fs::fstat(copy) else { return Kind::Harmless };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if (0..=2).contains(&fd) && is_log(copy) => Kind::Harmless,
        FileType::RegularFile | FileType::BlockDevice => Kind::Storage,
        FileType::CharacterDevice => {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            let known = HARMLESS_DEVICES.iter().any(|(of, one)| *of == major && one.is_none_or(|one| one == minor));
            if known {
                return Kind::Harmless;
            }
            Kind::Foreign(format!("it has the device {path} open: what was asked of it may go on without the process"))
        }
        _ => Kind::Harmless,
    }
}

/// Output that others may hold open as well: a shell and everything it has started share one description.
fn is_log(copy: &OwnedFd) -> bool {
    let flags = rustix::fs::fcntl_getfl(copy).unwrap_or(OFlags::empty());
    flags.contains(OFlags::APPEND) || flags & OFlags::RWMODE == OFlags::WRONLY
}

/// Whether data can be changed through it.
pub(super) fn is_writable(copy: &OwnedFd) -> bool {
    let flags = rustix::fs::fcntl_getfl(copy).unwrap_or(OFlags::empty());
    flags & OFlags::RWMODE != OFlags::RDONLY && !flags.contains(OFlags::APPEND)
}

/// What a socket is, in a backend of these processes.
pub(super) fn of_socket(copy: &OwnedFd, members: &[u32]) -> Kind {
    let remote = "it has network connections: data already sent to a storage target cannot be called back from here";
    let Ok(domain) = rustix::net::sockopt::socket_domain(copy) else { return Kind::Harmless };
    let Ok(peer) = rustix::net::getpeername(copy) else { return Kind::Harmless };
    if [AddressFamily::INET, AddressFamily::INET6, VSOCK].contains(&domain) {
        return Kind::Foreign(remote.to_owned());
    }
    let stream = rustix::net::sockopt::socket_type(copy).is_ok_and(|it| it != SocketType::DGRAM);
    let server = peer.and_then(|peer| server_name(&SocketAddrUnix::try_from(peer).ok()?));
    match server {
        Some(server) if domain == AddressFamily::UNIX && stream => {
            // Who listens has the credentials of this socket; a server of the backend's own is looked at like the rest of it.
            let listener = rustix::net::sockopt::socket_peercred(copy).ok();
            let listener = listener.and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
            let own = listener.is_some_and(|pid| members.contains(&pid));
            if own || HARMLESS_SERVERS.iter().any(|harmless| server.starts_with(harmless)) {
                return Kind::Harmless;
            }
            Kind::Foreign(format!(
                "it is connected to the server at {server}: what that one does for it does not end with the backend"
            ))
        }
        _ => Kind::Harmless,
    }
}

/// The name at which the other side listens, if it is a server: who connects has no name.
fn server_name(peer: &SocketAddrUnix) -> Option<String> {
    let path = peer.path_bytes().filter(|path| !path.is_empty()).map(|path| String::from_utf8_lossy(path).into_owned());
    let name = || peer.abstract_name().filter(|name| !name.is_empty());
    path.or_else(|| name().map(|name| format!("@{}", String::from_utf8_lossy(name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_client_of_another_server_is_told_from_the_server_and_from_a_pair() {
        let path = std::env::temp_dir().join(format!("warmswap-kind-{}", std::process::id()));
        let _stale = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let client = OwnedFd::from(UnixStream::connect(&path).expect("it listens"));
        let server = OwnedFd::from(listener.accept().expect("a client").0);
        let (one, _other) = UnixStream::pair().expect("a pair");
        let Kind::Foreign(reason) = of_socket(&client, &[]) else { panic!("somebody else's server") };
        assert!(reason.contains(path.to_str().expect("plain text")), "{reason}");
        assert_eq!(of_socket(&client, &[std::process::id()]), Kind::Harmless, "a server of the backend's own");
        assert_eq!(of_socket(&server, &[]), Kind::Harmless);
        assert_eq!(of_socket(&OwnedFd::from(one), &[]), Kind::Harmless);
        assert_eq!(of_socket(&OwnedFd::from(listener), &[]), Kind::Harmless);
        std::fs::remove_file(path).expect("it is there");
    }

    #[test]
    fn devices_that_are_not_known_to_be_harmless_are_foreign() {
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).expect("everybody has one"));
        for path in ["/dev/null", "/dev/zero", "/dev/urandom"] {
            assert_eq!(of_file(&open(path), 7, path), Kind::Harmless);
        }
        // Of the same driver as /dev/null, and not on the list.
        if let Ok(file) = std::fs::File::open("/dev/kmsg") {
            assert!(matches!(of_file(&OwnedFd::from(file), 7, "/dev/kmsg"), Kind::Foreign(_)));
        }
    }

    #[test]
    fn output_at_the_standard_descriptors_is_no_storage() {
        let path = std::env::temp_dir().join(format!("warmswap-log-{}", std::process::id()));
        let log = OwnedFd::from(std::fs::File::create(&path).expect("a file"));
        let both = std::fs::File::options().read(true).write(true).open(&path).expect("a file");
        assert_eq!(of_file(&log, 2, "log"), Kind::Harmless);
        assert_eq!(of_file(&log, 3, "image"), Kind::Storage);
        assert_eq!(of_file(&OwnedFd::from(both), 0, "image"), Kind::Storage);
        std::fs::remove_file(path).expect("it is there");
    }
}
