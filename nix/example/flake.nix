# A machine that runs NixOS becomes a builder with a name and certificate of its own: this goes beside its
# configuration.nix, in /etc/nixos. `your-organisation` is your fork or mirror.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
  inputs.nix-relay.url = "github:your-organisation/nix-relay";
  inputs.nix-relay.inputs.nixpkgs.follows = "nixpkgs";
  outputs = { nixpkgs, nix-relay, ... }: {
    nixosConfigurations.builder = nixpkgs.lib.nixosSystem {
      modules = [
        # What the machine is already: its disks, its users, how you reach it.
        ./configuration.nix
        nix-relay.nixosModules.default
        {
          services.nix-relay = {
            enable = true;
            # The audience of its tokens is then https://relay.example.com.
            nginx.enable = true;
            nginx.domain = "relay.example.com";
            settings.auth.allowed_org = "your-organisation";
            # Results stay for a week.
            keepResults = 7;
          };
          networking.firewall.allowedTCPPorts = [
            80
            443
          ];
          security.acme.acceptTerms = true;
          security.acme.defaults.email = "you@example.com";
        }
      ];
    };
  };
}
