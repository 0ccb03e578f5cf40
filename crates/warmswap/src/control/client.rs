//! The asking end of the control socket.

use std::io::{BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use super::line::read_line;

/// Longest answer, in bytes.
const ANSWER_MAX: usize = 16 * 1024 * 1024;
/// A broker that does not accept a connection, or a command, within this is taken for stopped.
const ACCEPT_MAX: Duration = Duration::from_secs(5);

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no warmswap answers at {path}: {source}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection ended in the middle.
    #[error("the connection to warmswap ended: {0}")]
    Ended(std::io::Error),
    /// It was waited for long enough.
    #[error("warmswap at {path} has not answered within {} s", .waited.as_secs_f64().round())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long.
        waited: Duration,
    },
    /// It answered with an error.
    #[error("{message}")]
    Refused {
        /// Exit code for the command line.
        code: u8,
        /// The reason.
        message: String,
    },
}

/// A connection to a control socket, good for many commands.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    path: PathBuf,
    line_max: usize,
    patience: Option<Duration>,
    until: Option<Instant>,
}

impl Client {
    /// Connects to the control socket of one device. Where nobody accepts, that is not waited for without end.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`], [`ClientError::Silent`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connected = || -> rustix::io::Result<UnixStream> {
            let address = SocketAddrUnix::new(path)?;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // It bounds the wait for a place in the queue of the listener, too.
            set_socket_timeout(&socket, Timeout::Send, Some(ACCEPT_MAX))?;
            rustix::net::connect(&socket, &address)?;
            Ok(UnixStream::from(socket))
        };
        match connected() {
            Ok(stream) => Ok(Client {
                reader: BufReader::new(stream),
                path: path.to_owned(),
                line_max: ANSWER_MAX,
                patience: None,
                until: None,
            }),
            Err(rustix::io::Errno::AGAIN) => Err(ClientError::Silent { path: path.to_owned(), waited: ACCEPT_MAX }),
            Err(error) => Err(ClientError::Unreachable { path: path.to_owned(), source: error.into() }),
        }
    }

    /// Gives up on an answer that is not whole after this; none waits for ever.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// Gives up on everything that has not been answered by then; none waits for ever.
    pub fn set_end(&mut self, until: Option<Instant>) {
        self.until = until;
    }

    /// Takes no answer that is longer than this, in bytes.
    pub fn set_line_max(&mut self, bytes: usize) {
        self.line_max = bytes.min(ANSWER_MAX);
    }

    /// Sends a command and reads one answer.
    ///
    /// # Errors
    /// The connection ended, or the answer is an error.
    pub fn ask(&mut self, command: &Value) -> Result<Value, ClientError> {
        self.tell(command)?;
        self.line()
    }

    /// Sends a command whose answers are read one by one.
    ///
    /// # Errors
    /// The connection ended.
    pub fn tell(&mut self, command: &Value) -> Result<(), ClientError> {
        // In one piece, so that its patience is for the whole of it.
        let sent = self.reader.get_mut().write_all(format!("{command}\n").as_bytes());
        sent.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => self.silent(ACCEPT_MAX),
            _ => ClientError::Ended(error),
        })
    }

    fn silent(&self, waited: Duration) -> ClientError {
        ClientError::Silent { path: self.path.clone(), waited }
    }

    /// Reads one more answer to a command that has several.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn line(&mut self) -> Result<Value, ClientError> {
        Ok(self.line_as_sent()?.0)
    }

    /// The same, together with the text of the answer, in which the order of members is the sender's.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn line_as_sent(&mut self) -> Result<(Value, String), ClientError> {
        let began = Instant::now();
        let patience = self.patience.and_then(|patience| began.checked_add(patience));
        let until = [patience, self.until].into_iter().flatten().min();
        let line = read_line(&mut self.reader, self.line_max, until).map_err(|error| match error.kind() {
            ErrorKind::TimedOut => self.silent(began.elapsed()),
            _ => ClientError::Ended(error),
        })?;
        if line.is_empty() {
            return Err(ClientError::Ended(ErrorKind::UnexpectedEof.into()));
        }
        let wrong = |what: String| ClientError::Ended(std::io::Error::new(ErrorKind::InvalidData, what));
        if line.len() == self.line_max && line.last() != Some(&b'\n') {
            return Err(wrong(format!("an answer of more than {} bytes", self.line_max)));
        }
        let line = String::from_utf8(line).map_err(|error| wrong(format!("an answer that is no text: {error}")))?;
        let value: Value = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
        match value.get("error") {
            Some(error) => Err(ClientError::Refused {
                code: error["code"].as_u64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                message: error["message"].as_str().unwrap_or("no reason was given").to_owned(),
            }),
            None => Ok((value, line)),
        }
    }

    /// Status of everything behind the socket.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn status(&mut self) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "status"}))
    }

    /// Ends the process behind the socket, which leaves everything to the next one of its program. Answers with what it was.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn upgrade(&mut self) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "upgrade"}))
    }

    /// Has the program read its configuration again: the next process goes by it. Answers with `pid`, that of the one that ends, and
    /// `devices`, the names of those that are in it.
    ///
    /// # Errors
    /// As [`Client::ask`]; what is wrong with the configuration, a line for each.
    pub fn reload(&mut self) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "reload"}))
    }

    /// Has the shadow replaced by one that is newly started. Answers with the generation of the one that goes.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn refresh(&mut self, device: &str) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "refresh", "device": device}))
    }

    /// Makes a failover and waits for its end.
    ///
    /// # Errors
    /// As [`Client::ask`]. A refused failover is an answer, not an error.
    pub fn failover(&mut self, device: &str, now: bool, reason: &str) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "failover", "device": device, "now": now, "reason": reason}))
    }
}
