//! The asking end of the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

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
}

impl Client {
    /// Connects to the control socket of one device.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream =
            UnixStream::connect(path).map_err(|source| ClientError::Unreachable { path: path.to_owned(), source })?;
        Ok(Client { reader: BufReader::new(stream) })
    }

    /// Sends a command and reads one answer.
    ///
    /// # Errors
    /// The connection ended, or the answer is an error.
    pub fn ask(&mut self, command: &Value) -> Result<Value, ClientError> {
        writeln!(self.reader.get_mut(), "{command}").map_err(ClientError::Ended)?;
        self.line()
    }

    /// Reads one more answer to a command that has several.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn line(&mut self) -> Result<Value, ClientError> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).map_err(ClientError::Ended)?;
        if read == 0 {
            return Err(ClientError::Ended(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let value: Value = serde_json::from_str(&line)
            .map_err(|error| ClientError::Ended(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))?;
        match value.get("error") {
            Some(error) => Err(ClientError::Refused {
                code: error["code"].as_u64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                message: error["message"].as_str().unwrap_or("no reason was given").to_owned(),
            }),
            None => Ok(value),
        }
    }

    /// Status of everything behind the socket.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn status(&mut self) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "status"}))
    }

    /// Makes a failover and waits for its end.
    ///
    /// # Errors
    /// As [`Client::ask`]. A refused failover is an answer, not an error.
    pub fn failover(&mut self, device: &str, now: bool, reason: &str) -> Result<Value, ClientError> {
        self.ask(&json!({"verb": "failover", "device": device, "now": now, "reason": reason}))
    }
}
