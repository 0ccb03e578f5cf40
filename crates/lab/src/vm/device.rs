//! The kinds of devices a guest is given.

/// What the guarded device is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Device {
    /// A disk.
    #[default]
    Blk,
    /// A network card.
    Net,
    /// A source of random bytes.
    Rng,
    /// A SCSI adapter with a disk that is only read.
    Scsi,
    /// A shared file system.
    Fs,
}

impl Device {
    /// All of them.
    pub(crate) const ALL: [Self; 5] = [Self::Blk, Self::Net, Self::Rng, Self::Scsi, Self::Fs];

    /// The word for it: in options, on the guest's command line and for `warmswap guard --type`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Rng => "rng",
            Self::Scsi => "scsi",
            Self::Fs => "fs",
        }
    }

    /// The kind of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|device| device.name() == name)
    }

    /// The kernel modules that drive it, beside that of the bus.
    pub(crate) fn drivers(self) -> &'static [&'static str] {
        match self {
            Self::Blk => &["virtio_blk"],
            Self::Net => &["virtio_net"],
            Self::Rng => &["virtio_rng"],
            Self::Scsi => &["virtio_scsi", "sd_mod"],
            Self::Fs => &["virtiofs"],
        }
    }
}
