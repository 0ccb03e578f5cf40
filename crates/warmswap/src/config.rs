//! What one device is told on the command line.

use std::path::PathBuf;

use warmswap_core::PairConfig;

/// Where a device's backends come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// They are started from one command line with a `{socket}` or `{fd}` placeholder.
    Command(Vec<String>),
    /// Somebody else starts them; they listen at these two paths.
    External {
        /// Where the first primary listens.
        primary: PathBuf,
        /// Where the first shadow listens.
        shadow: Option<PathBuf>,
    },
}

/// A guarded device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceConfig {
    /// Its name: in events, metrics, control socket and process groups.
    pub(crate) name: String,
    /// Where the VMM connects.
    pub(crate) socket: PathBuf,
    /// File mode of that socket; what the umask leaves if not given.
    pub(crate) socket_mode: Option<u32>,
    /// Group of that socket.
    pub(crate) socket_group: Option<u32>,
    /// The broker before this one, if it ended without cleaning up.
    pub(crate) predecessor: Option<u32>,
    /// Where its backends come from.
    pub(crate) source: Source,
    /// Policy and bounds.
    pub(crate) pair: PairConfig,
    /// Directory for the backends' sockets.
    pub(crate) run_dir: PathBuf,
    /// Directory for the control socket.
    pub(crate) control_dir: PathBuf,
    /// The operator's fence command (F2).
    pub(crate) fence_command: Option<String>,
}

impl DeviceConfig {
    /// Why there is never a shadow, if that was asked for.
    pub(crate) fn no_shadow(&self) -> Option<&'static str> {
        let why = match &self.source {
            Source::Command(_) => "it was started with --no-shadow",
            Source::External { .. } => "it was started without --shadow-socket",
        };
        (!self.pair.shadow).then_some(why)
    }

    /// Path of the device's control socket.
    #[must_use]
    pub(crate) fn control_socket(&self) -> PathBuf {
        crate::control::socket_path(&self.control_dir, &self.name)
    }
}
