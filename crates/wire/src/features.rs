//! Virtio and vhost-user feature bits, and what of them may pass a broker, per device type.

use serde::{Deserialize, Serialize};
use warmswap_zoo::{Animal, loose};

bitflags::bitflags! {
    /// Virtio feature bits that have a meaning below the device type (virtio 1.3 §6), plus vhost's own.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VirtioFeatures: u64 {
        /// Legacy: notify when the ring runs empty.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// vhost: log all guest memory writes (`VHOST_F_LOG_ALL`).
        const LOG_ALL = 1 << 26;
        /// Legacy: any descriptor layout.
        const ANY_LAYOUT = 1 << 27;
        /// Indirect descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// `used_event` and `avail_event`.
        const EVENT_IDX = 1 << 29;
        /// vhost-user: protocol features can be negotiated.
        const PROTOCOL_FEATURES = 1 << 30;
        /// Not a legacy device.
        const VERSION_1 = 1 << 32;
        /// Behind an IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// Packed rings.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in order.
        const IN_ORDER = 1 << 35;
        /// Memory ordering as the platform defines it.
        const ORDER_PLATFORM = 1 << 36;
    }
}

bitflags::bitflags! {
    /// vhost-user protocol features (`VHOST_USER_PROTOCOL_F_*`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct ProtocolFeatures: u64 {
        /// More than one queue.
        const MQ = 1 << 0;
        /// The dirty log comes as a descriptor.
        const LOG_SHMFD = 1 << 1;
        /// SEND_RARP after migration.
        const RARP = 1 << 2;
        /// Acknowledgements on request.
        const REPLY_ACK = 1 << 3;
        /// NET_SET_MTU.
        const MTU = 1 << 4;
        /// A channel for back-end requests.
        const BACKEND_REQ = 1 << 5;
        /// SET_VRING_ENDIAN.
        const CROSS_ENDIAN = 1 << 6;
        /// Crypto sessions.
        const CRYPTO_SESSION = 1 << 7;
        /// Postcopy migration.
        const PAGEFAULT = 1 << 8;
        /// Configuration space.
        const CONFIG = 1 << 9;
        /// The back-end may send descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// Doorbells mapped into the guest.
        const HOST_NOTIFIER = 1 << 11;
        /// In-flight region.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and calls as messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// Memory regions one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// Device status.
        const STATUS = 1 << 16;
        /// Xen mappings.
        const XEN_MMAP = 1 << 17;
        /// Shared objects.
        const SHARED_OBJECT = 1 << 18;
        /// Transfer of device state.
        const DEVICE_STATE = 1 << 19;
        /// Stop without drain.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Ring addresses are guest-physical.
        const GPA_ADDRESSES = 1 << 21;
        /// Shared memory mappings.
        const SHMEM = 1 << 22;
        /// Stop without drain, per call.
        const GET_VRING_BASE_SKIP_DRAIN = 1 << 23;
    }
}

/// The virtio device behind a socket. The protocol does not tell; the operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceType {
    /// Block device (virtio id 2).
    Blk,
    /// SCSI host (8).
    Scsi,
    /// Network card (1).
    Net,
    /// Shared file system (26).
    Fs,
    /// Entropy source (4).
    Rng,
    /// Console (3).
    Console,
    /// Input device (18).
    Input,
}

impl DeviceType {
    /// All of them.
    pub const ALL: &[DeviceType] = &[
        DeviceType::Blk,
        DeviceType::Scsi,
        DeviceType::Net,
        DeviceType::Fs,
        DeviceType::Rng,
        DeviceType::Console,
        DeviceType::Input,
    ];

    /// The name used on the command line and in every report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DeviceType::Blk => "blk",
            DeviceType::Scsi => "scsi",
            DeviceType::Net => "net",
            DeviceType::Fs => "fs",
            DeviceType::Rng => "rng",
            DeviceType::Console => "console",
            DeviceType::Input => "input",
        }
    }

    /// The type of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// Whether a request whose completion was never seen may be executed again. True where every request is idempotent.
    /// Stateful devices can be handed over only after a proved drain.
    #[must_use]
    pub fn may_replay(self) -> bool {
        matches!(self, DeviceType::Blk | DeviceType::Net | DeviceType::Rng)
    }

    /// Whether the device is more than its rings: its backend holds what the guest has opened, and another one can go on only with that
    /// (vhost-user, "Migrating back-end state"). Such a device cannot outlive a backend that died.
    #[must_use]
    pub fn carries_state(self) -> bool {
        self == DeviceType::Fs
    }

    /// Whether a ring of that index carries requests that wait for an answer. The others hold buffers that wait to be filled, which
    /// may take for ever (virtio 1.3 §5.1.2, §5.3.2, §5.6.2, §5.8.2).
    #[must_use]
    pub fn carries_requests(self, ring: u32) -> bool {
        match self {
            DeviceType::Blk | DeviceType::Fs | DeviceType::Rng => true,
            DeviceType::Scsi => ring != 1,
            DeviceType::Net | DeviceType::Console | DeviceType::Input => ring % 2 == 1,
        }
    }

    /// Virtio features that may pass. Everything else is masked: packed rings expose no index to observe, in-order devices may write
    /// one used entry for many requests, an IOMMU makes
    /// addresses private to a backend, notification data and ring reset change how rings are driven, and zoned devices have
    /// requests that must not be executed twice.
    #[must_use]
    pub fn virtio_features(self) -> u64 {
        let transport = VirtioFeatures::NOTIFY_ON_EMPTY
            | VirtioFeatures::LOG_ALL
            | VirtioFeatures::ANY_LAYOUT
            | VirtioFeatures::INDIRECT_DESC
            | VirtioFeatures::EVENT_IDX
            | VirtioFeatures::PROTOCOL_FEATURES
            | VirtioFeatures::VERSION_1
            | VirtioFeatures::ORDER_PLATFORM;
        let packed = if loose(Animal::PackedOffered) { VirtioFeatures::RING_PACKED.bits() } else { 0 };
        // Bits 0 to 23 and 50 to 63 belong to the device type.
        let device: u64 = match self {
            // virtio 1.3 §5.2.3: size_max, seg_max, geometry, ro, blk_size, flush, topology, config_wce, mq, discard,
            // write_zeroes, lifetime. Not 16 (secure erase), not 17 (zoned).
            DeviceType::Blk => {
                [1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15].iter().fold(0, |bits, bit| bits | 1_u64 << bit)
            }
            // §5.6.3: inout, hotplug, change, t10_pi.
            DeviceType::Scsi => 0b1111,
            // §5.1.3, without the control-queue state that a backend may keep to itself beyond bit 23.
            DeviceType::Net => 0x00ff_ffff,
            DeviceType::Fs => 0b1,
            DeviceType::Rng => 0,
            DeviceType::Console => 0b111,
            DeviceType::Input => 0,
        };
        transport.bits() | device | packed
    }

    /// Protocol features that may be offered to the VMM, if both backends have them. RESET_DEVICE is not among them: a VMM without
    /// it stops rings one by one, and a stop has an answer that can be verified.
    #[must_use]
    pub fn protocol_features(self) -> ProtocolFeatures {
        use ProtocolFeatures as P;
        let common = P::MQ | P::LOG_SHMFD | P::REPLY_ACK | P::CONFIGURE_MEM_SLOTS;
        match self {
            DeviceType::Blk => common | P::BACKEND_REQ | P::CONFIG,
            DeviceType::Scsi => common | P::BACKEND_REQ,
            DeviceType::Net => common | P::RARP | P::MTU | P::BACKEND_REQ,
            DeviceType::Fs => common,
            DeviceType::Rng | DeviceType::Console | DeviceType::Input => common | P::CONFIG,
        }
    }

    /// Protocol features the broker may use on a link, whether or not the VMM does. `region`: the backend may be given an
    /// in-flight region. libvhost-user panics on one for a file system device.
    #[must_use]
    pub fn link_features(self, region: bool) -> ProtocolFeatures {
        let tracked = region && self != DeviceType::Fs;
        let region = if tracked { ProtocolFeatures::INFLIGHT_SHMFD } else { ProtocolFeatures::empty() };
        let state = if self.carries_state() { ProtocolFeatures::DEVICE_STATE } else { ProtocolFeatures::empty() };
        self.protocol_features() | region | state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of each device, in the order of [`DeviceType::ALL`].
    fn of_each<T>(of: impl Fn(DeviceType) -> T) -> Vec<T> {
        DeviceType::ALL.iter().map(|device| of(*device)).collect()
    }

    #[test]
    fn what_no_broker_could_hand_over_is_masked_for_every_device() {
        use ProtocolFeatures as P;
        let virtio = VirtioFeatures::RING_PACKED | VirtioFeatures::IN_ORDER | VirtioFeatures::ACCESS_PLATFORM;
        let protocol = P::CRYPTO_SESSION
            | P::PAGEFAULT
            | P::BACKEND_SEND_FD
            | P::HOST_NOTIFIER
            | P::RESET_DEVICE
            | P::INBAND_NOTIFICATIONS
            | P::SHARED_OBJECT
            | P::GET_VRING_BASE_INFLIGHT
            | P::GPA_ADDRESSES
            | P::SHMEM
            | P::GET_VRING_BASE_SKIP_DRAIN;
        for device in DeviceType::ALL {
            assert_eq!(device.virtio_features() & virtio.bits(), 0, "{}", device.name());
            assert_eq!(device.protocol_features() & protocol, P::empty(), "{}", device.name());
            let tracked = device.link_features(true).contains(P::INFLIGHT_SHMFD);
            assert_eq!(tracked, *device != DeviceType::Fs, "{}", device.name());
            let state = if device.carries_state() { P::DEVICE_STATE } else { P::empty() };
            assert_eq!(device.link_features(false), device.protocol_features() | state);
            assert!(!device.protocol_features().contains(P::DEVICE_STATE), "it is the broker's, not the VMM's");
        }
    }

    #[test]
    fn every_device_has_its_bits() {
        const TRANSPORT: u64 = 0x11_7d00_0000;
        let bits = of_each(DeviceType::virtio_features);
        assert_eq!(bits, [0xfe76, 0xf, 0xff_ffff, 0x1, 0, 0x7, 0].map(|device| device | TRANSPORT));
        let bits = of_each(|device| device.protocol_features().bits());
        assert_eq!(bits, [0x822b, 0x802b, 0x803f, 0x800b, 0x820b, 0x820b, 0x820b]);
    }

    #[test]
    fn only_what_is_idempotent_is_replayed_and_only_requests_are_waited_for() {
        let replayed = of_each(DeviceType::may_replay);
        assert_eq!(replayed, [true, false, true, false, true, false, false]);
        let carry = |ring| of_each(|device| device.carries_requests(ring));
        assert_eq!(carry(0), [true, true, false, true, true, false, false]);
        assert_eq!(carry(1), [true, false, true, true, true, true, true]);
        assert_eq!(carry(2), [true, true, false, true, true, false, false]);
        for device in DeviceType::ALL {
            assert_eq!(DeviceType::from_name(device.name()), Some(*device));
        }
        assert_eq!(DeviceType::from_name("vsock"), None);
    }
}
